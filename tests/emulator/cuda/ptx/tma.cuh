// Stands in for src/cuda/ptx/tma.cuh.
#pragma once

#include "core/launch_sm90.h"
#include "cuda/ptx/copy.cuh"
#include "host/plan.h"

namespace strobe::ptx {

inline emulator::Barrier& barrier_at(u32 barrier) { return emulator::block->barriers[barrier]; }
inline void complete(emulator::Barrier& b) {
  if (b.pending != 0 || b.bytes != 0) return;
  b.phase ^= 1;
  b.pending = b.arrivals;
  emulator::block->moved = true;
}
inline void arrive(emulator::Block& block, u32 barrier) {
  emulator::Barrier& b = block.barriers[barrier];
  if (b.pending == 0) {
    std::printf("FAILED a barrier gets more arrivals than its phase takes\n");
    std::exit(1);
  }
  --b.pending;
  complete(b);
}
inline void mbarrier_init_cta(u32 barrier, u32 arrivals) { barrier_at(barrier) = {arrivals, arrivals, 0, 0}; }
inline void fence_mbarrier_init() {}
inline void mbarrier_arrive(u32 barrier) { arrive(*emulator::block, barrier); }
inline void mbarrier_expect_tx(u32 barrier, u32 bytes) {
  barrier_at(barrier).bytes += bytes;
  mbarrier_arrive(barrier);
}
inline void mbarrier_try_wait(u32 barrier, u32 parity) {
  emulator::block->wait([&] { return barrier_at(barrier).phase != parity; });
}

inline void prefetch_tensormap(const TensorMap&) {}
inline bool elect() {
  __syncwarp();
  return threadIdx.x % 32 == 7;  // which lane it is must not matter
}
// A map's first word is its description. For each element of a box: where it lies in shared memory, and in the tensor,
// null outside of it.
template <class F>
void for_box(const host::TensorBox& box, u32 shared, const i64 (&start)[4], F f) {
  u32 row = 0;
  for (u32 d = 0; d < box.box[3]; ++d)
    for (u32 c = 0; c < box.box[2]; ++c)
      for (u32 b = 0; b < box.box[1]; ++b, ++row)
        for (u32 a = 0; a < box.box[0]; ++a) {
          const i64 place[4] = {start[0] + a, start[1] + b, start[2] + c, start[3] + d};
          bool exists = true;
          i64 offset = place[0] * 2;
          for (int i = 0; i < 4; ++i) exists &= place[i] >= 0 && u64(place[i]) < box.dims[i];
          for (int i = 1; i < 4; ++i) offset += place[i] * i64(box.strides[i - 1]);
          const u32 to = shared + row * 128 + a * 2;
          char* const data = const_cast<char*>(static_cast<const char*>(box.data));
          f(at(to ^ (to >> 7 & 7) << 4, 2), exists ? data + offset : nullptr);
        }
}
inline u32 check_box(const host::TensorBox& box, u32 shared) {
  if (shared % 1024 != 0) {
    std::printf("FAILED a box lies at a place that is no multiple of 1024 bytes\n");
    std::exit(1);
  }
  return box.box[0] * box.box[1] * box.box[2] * box.box[3] * 2;
}
// The place is worthless from now on, and holds the box at some later time.
inline void tma_load_to(emulator::Block& block, u32 shared, const TensorMap& map, u32 barrier, i32 c0, i32 c1, i32 c2,
                        i32 c3) {
  const auto* box = reinterpret_cast<const host::TensorBox*>(map.opaque[0]);
  const u32 bytes = check_box(*box, shared);
  std::memset(block.memory() + (at(shared, bytes) - smem), 0xff, bytes);
  block.copies.push_back([=] {
    for_box(*box, shared, {c0, c1, c2, c3}, [](void* to, const void* from) {
      const u16 zero = 0;
      std::memcpy(to, from ? from : &zero, 2);
    });
    emulator::Barrier& b = barrier_at(barrier);
    b.bytes -= bytes;
    complete(b);
  });
}
inline void tma_load(u32 shared, const TensorMap& map, u32 barrier, i32 c0, i32 c1, i32 c2, i32 c3) {
  tma_load_to(*emulator::block, shared, map, barrier, c0, c1, c2, c3);
}
// In each block the box lands at a time of its own.
inline void tma_load_to_both(u32 shared, const TensorMap& map, u32 barrier, i32 c0, i32 c1, i32 c2, i32 c3) {
  emulator::Block* const own = emulator::block;
  for (const auto& block : own->cluster.blocks) tma_load_to(*block, shared, map, barrier, c0, c1, c2, c3);
}

inline void mbarrier_arrive_at(u32 barrier, u32 rank) {
  emulator::Block& block = *emulator::block->cluster.blocks[rank];
  if (block.ended()) {
    std::printf("FAILED a block that has ended is told of a free stage\n");
    std::exit(1);
  }
  arrive(block, barrier);
}
inline void cluster_sync() {
  emulator::Block& block = *emulator::block;
  emulator::Cluster& cluster = block.cluster;
  const unsigned generation = cluster.generation;
  if (++cluster.arrived == cluster.blocks.size() * block.fibers.size()) {
    cluster.arrived = 0;
    ++cluster.generation;
    block.moved = true;
  }
  block.wait([&] { return cluster.generation != generation; });
}

// Reads shared memory at some later time.
inline void tma_store(const TensorMap& map, u32 shared, i32 c0, i32 c1, i32 c2, i32 c3) {
  const auto* box = reinterpret_cast<const host::TensorBox*>(map.opaque[0]);
  check_box(*box, shared);
  const auto group = emulator::block->fiber().stores;
  ++*group;
  emulator::block->copies.push_back([=] {
    for_box(*box, shared, {c0, c1, c2, c3}, [](const void* from, void* to) {
      if (to) std::memcpy(to, from, 2);
    });
    --*group;
  });
}
inline void tma_store_commit() {
  emulator::Fiber& f = emulator::block->fiber();
  f.store_groups.push_back(f.stores);
  f.stores = std::make_shared<int>(0);
}
inline void tma_store_wait_read() {
  auto& groups = emulator::block->fiber().store_groups;
  emulator::block->wait([&] {
    for (const auto& group : groups)
      if (*group) return false;
    return true;
  });
  groups.clear();
}

inline void fence_proxy_async() {}
inline void bar_sync(u32 id, u32 threads) { emulator::named_barrier(id, threads, true); }
inline void bar_arrive(u32 id, u32 threads) { emulator::named_barrier(id, threads, false); }
template <int kRegisters>
void setmaxnreg_inc() {}
template <int kRegisters>
void setmaxnreg_dec() {}

}  // namespace strobe::ptx
