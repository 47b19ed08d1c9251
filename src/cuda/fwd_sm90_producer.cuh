// The producing warps of fwd_sm90: they take tiles, publish them as work items and keep tensor copies of K and V ahead
// of the consumers.
#pragma once

#include "cuda/fwd_sm90_work.cuh"
#include "cuda/ptx/grid.cuh"
#include "cuda/ptx/tma.cuh"

namespace strobe {

// Where everything lies in shared memory, as 32-bit addresses.
template <FwdSm90Config C>
struct Sm90Shared {
  static constexpr u32 kKeys = u32(C.stages_q * query_bytes(C)), kValues = kKeys + u32(C.stages * key_bytes(C));
  static constexpr u32 kStaging = kValues + u32(C.stages * value_bytes(C));
  static constexpr u32 kBounds = u32(tile_bytes(C)), kWork = kBounds + u32(bounds_bytes(C));
  static constexpr u32 kBarriers = kWork + u32(kWorkSlots * kWorkBytes);

  unsigned char* base;
  u32 at;

  __device__ __forceinline__ u32 q(u32 stage, int warpgroup) const {
    return at + stage * u32(query_bytes(C)) + u32(warpgroup * 64 * panels(C.head_dim) * 128);
  }
  __device__ __forceinline__ u32 k(u32 stage) const { return at + kKeys + stage * u32(key_bytes(C)); }
  __device__ __forceinline__ u32 v(u32 stage) const { return at + kValues + stage * u32(value_bytes(C)); }
  // Where a warpgroup's rows are staged; stage: of their queries.
  __device__ __forceinline__ u32 rows(u32 stage, int warpgroup) const {
    if constexpr (C.staging == kInPlaceOfQ) return q(stage, warpgroup);
    return at + kStaging + u32(warpgroup * 64 * panels(C.head_dim_v) * 128);
  }
  __device__ __forceinline__ RowKeys* bounds() const { return reinterpret_cast<RowKeys*>(base + kBounds); }
  __device__ __forceinline__ Sm90Work& work(u32 item) const {
    return *reinterpret_cast<Sm90Work*>(base + kWork + item % kWorkSlots * u32(kWorkBytes));
  }
  __device__ __forceinline__ u32 work_full() const { return at + kBarriers; }
  __device__ __forceinline__ u32 work_free() const { return at + kBarriers + 8; }
  __device__ __forceinline__ u32 q_full(u32 stage) const { return at + kBarriers + 16 + stage * 16; }
  __device__ __forceinline__ u32 q_free(u32 stage) const { return q_full(stage) + 8; }
  __device__ __forceinline__ u32 k_full(u32 stage) const { return at + kBarriers + 16 + C.stages_q * 16 + stage * 32; }
  __device__ __forceinline__ u32 k_free(u32 stage) const { return k_full(stage) + 8; }
  __device__ __forceinline__ u32 v_full(u32 stage) const { return k_full(stage) + 16; }
  __device__ __forceinline__ u32 v_free(u32 stage) const { return k_full(stage) + 24; }
};

// A position in a ring of stages, and the parity of its barriers' phase.
template <int kStages>
struct Sm90Ring {
  u32 stage = 0, parity = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

// Where a box of keys begins: in a batch entry, or in a page.
struct Sm90Place {
  i32 row, batch;
};

// Where a tile's boxes are. In pages each lane knows of one box, of this tile or of one near it: the first box of this
// tile is lane `first`'s.
struct Sm90Boxes {
  Sm90Place place;
  i32 first;
};

// Tiles before an item's end at which the next item is taken.
constexpr i32 kTilesAhead = 2;

// Takes the scheduler's tile apart into the work item's slot. In steps through shared memory, since the producer has
// few registers: a SeqInfo and a Walk at once would not fit.
template <FwdSm90Config C>
__device__ __forceinline__ void prepare(const FwdSm90Launch& launch, Sm90Scheduler<C>& scheduler, Sm90Work& work) {
  const AttnParams& p = launch.p;
  const Sm90Tile tile = scheduler.tile(launch);
  if (lane_id() == 0 && tile.batch < 0) work.head.first_row = -1;
  const i32 group = C.pack ? i32(launch.group.divisor) : 1;
  const auto token_of = [&](i32 row) { return C.pack ? i32(launch.group.quotient(u32(row))) : row; };
  const i32 first_row = tile.m_block * C.block_m, first_token = token_of(first_row), head = tile.group * group;
  if (lane_id() == 0 && tile.batch >= 0) {
    const SeqInfo seq = SeqInfo::of(p, tile.batch);
    work.mask = narrow(mask_of(p, seq));
    if constexpr (C.split != 0) {
      work.out = (tile.split * p.num_heads + head) * p.total_q + seq.q_batch * p.seqlen_q + seq.q_begin;
    } else {
      work.out = seq.q_index(p.out, first_token, head);
      work.lse = seq.lse_index(p, first_token, head);
    }
    work.head.first_row = first_row;
    work.rows_q = i32(seq.rows_q);
    work.batch = tile.batch;
    work.head_q = head;
    work.head_k = i32(launch.heads_per_k.quotient(u32(head)));
    work.head_v = i32(launch.heads_per_v.quotient(u32(head)));
    work.q_batch = i32(seq.q_batch);
    work.q_row = i32(seq.q_begin) + first_token;
    work.k_batch = i32(seq.k_batch);
    work.k_row = i32(seq.k_begin);
  }
  __syncwarp();
  if (lane_id() == 0 && tile.batch >= 0) {
    const i32 end_token = token_of(first_row + C.block_m - 1) + 1;
    i32 shift = work.mask.shift(first_token, end_token, C.block_n);
    if constexpr (C.paged != 0) shift -= shift % C.paged;  // boxes of rows stay within their pages
    work.shift = shift;
    work.mask.seqlen_k += shift;
    Walk32 walk = work.mask.visit(first_token, end_token, C.block_n);
    if constexpr (C.split != 0) {
      const i32 share = max(1, ceil_div(walk.tiles(), launch.splits));
      walk = split(walk, tile.split * share, (tile.split + 1) * share);
    }
    work.head.tiles = walk.tiles();
    i32 end = 0, start = 0;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const Run32 run = walk.run[r];
      work.run[r] = {run.begin, run.full_begin, run.full_end, run.end};
      if (run.end <= run.begin) continue;
      end = run.end;
      start = (start & 2) | r | (run.full_begin > run.begin || run.full_end < run.end ? 2 : 0);
    }
    const Run32 kept = walk.run[0];
    if (C.kept && kept.begin == 0 && kept.end == 1 && walk.run[1].begin > 1) start |= kKeptAlone;
    // Only a sequence's last tile reaches beyond its keys. What follows them there is another sequence's, or unused
    // memory: the tensor map makes zeros only of what lies outside of the tensor.
    const i32 keys = work.mask.seqlen_k, in_tile = keys - (end - 1) * C.block_n;
    const bool more = C.paged != 0 || work.k_row + keys - shift < launch.rows_k;
    work.head.stale = more && in_tile < C.block_n ? in_tile : C.block_n;
    work.head.start = start;
  }
  __syncwarp();
  if constexpr (consumers(C) > 1) {
    // A lane for each warpgroup and run.
    const int warpgroup = lane_id() / 2, r = lane_id() % 2;
    if (warpgroup < consumers(C) && tile.batch >= 0) {
      const auto run = work.run[r];
      i32 begin = run.begin, end = run.end;
      if (skips(C) && begin < end) {
        const i32 row = first_row + warpgroup * 64;
        const Run32 seen = work.mask.narrowed(begin, end, r == 1, token_of(row), token_of(row + 63) + 1, C.block_n);
        begin = seen.begin, end = seen.end;
      }
      work.seen[warpgroup][r] = {begin, end};
    }
    __syncwarp();
  }
}

// Lanes wait together and go on together: one that is late could sleep through a whole phase of a barrier.
__device__ __forceinline__ void wait_together(u32 barrier, u32 parity) {
  ptx::mbarrier_try_wait(barrier, parity);
  __syncwarp();
}

// Takes the next item and tells the warps that copy of it, once all of them know of the one before.
template <FwdSm90Config C>
__device__ __forceinline__ void publish(const FwdSm90Launch& launch, const Sm90Shared<C>& shared,
                                        Sm90Scheduler<C>& scheduler, u32 item) {
  if constexpr (scouts(C)) wait_together(shared.work_free(), (item & 1) ^ 1);
  scheduler.fetch(launch);
  prepare(launch, scheduler, shared.work(item));
  if (scouts(C) && lane_id() < telling_lanes(C)) ptx::mbarrier_arrive(shared.work_full());
}

// Brings an item's queries, whose barrier tells the consumers of the item, or that there is none.
template <FwdSm90Config C>
__device__ __forceinline__ void load_q(const FwdSm90Launch& launch, const Sm90Shared<C>& shared,
                                       Sm90Ring<C.stages_q>& ring, const Sm90Work& work) {
  const u32 full = shared.q_full(ring.stage);
  wait_together(shared.q_free(ring.stage), ring.parity);
  const bool elected = ptx::elect();
  if (elected && work.head.first_row >= 0) {
    const i32 head = work.head_q, row = work.q_row, batch = work.q_batch;
    const i32 tokens = C.pack ? i32(launch.group.quotient(64)) : 64;  // of a warpgroup
    ptx::mbarrier_expect_tx(full, u32(query_bytes(C)));
#pragma unroll
    for (int w = 0; w < consumers(C); ++w)
#pragma unroll
      for (int c = 0; c < panels(C.head_dim); ++c)
        ptx::tma_load(shared.q(ring.stage, w) + c * 64 * 128, launch.q, full, c * 64, head, row + w * tokens, batch);
  } else if (elected || q_telling_lanes(C) > 1) {
    ptx::mbarrier_arrive(full);
  }
  ring.advance();
}

// A warp that takes items: the one that brings keys need not stop for it.
template <FwdSm90Config C>
__device__ __forceinline__ void scout(const FwdSm90Launch& launch, const Sm90Shared<C>& shared) {
  Sm90Scheduler<C> scheduler;
  scheduler.start(launch);
  Sm90Ring<C.stages_q> ring;
  ring.parity = 1;  // every stage is free
#pragma unroll 1
  for (u32 item = 0;; ++item) {
    publish(launch, shared, scheduler, item);
    if constexpr (scout_brings_q(C)) load_q<C>(launch, shared, ring, shared.work(item));
    if (shared.work(item).head.first_row < 0) break;
  }
}

// warp: of those that copy. The first announces every tile's bytes.
template <FwdSm90Config C>
__device__ __forceinline__ void produce(const FwdSm90Launch& launch, const Sm90Shared<C>& shared, int warp) {
  constexpr int kWarps = producer_warps(C), kBoxes = C.paged ? C.block_n / C.paged : 1;  // of a panel
  constexpr int kTogether = C.paged ? 32 / kBoxes : 1;  // tiles whose boxes a warp's lanes look up at once
  const AttnParams& p = launch.p;
  const int lane = lane_id();
  const int share = kWarps == 1 ? 0 : warp;  // of the copies
  const bool leads = share == 0;
  if (C.split != 0 && leads) ptx::start_dependents();
  if (leads && lane == 0) {
    ptx::prefetch_tensormap(launch.q);
    ptx::prefetch_tensormap(launch.k);
    ptx::prefetch_tensormap(launch.v);
    if constexpr (C.staging != kFromRegisters) ptx::prefetch_tensormap(launch.out);
  }
  Sm90Scheduler<C> scheduler;
  scheduler.start(launch);
  Sm90Ring<C.stages> k_ring, v_ring;
  Sm90Ring<C.stages_q> q_ring;
  q_ring.parity = k_ring.parity = v_ring.parity = 1;  // every stage is free
  constexpr bool kTakes = !scouts(C), kBringsQ = !scout_brings_q(C);
  if constexpr (kTakes) publish(launch, shared, scheduler, 0);
#pragma unroll 1
  for (u32 item = 0;; ++item) {
    const Sm90Work& work = shared.work(item);
    if constexpr (!kTakes) wait_together(shared.work_full(), item & 1);
    if (work.head.first_row < 0) {
      if constexpr (kBringsQ) load_q<C>(launch, shared, q_ring, work);
      break;
    }
    // Tiles are loaded from the last to the first, those of kept tokens behind the others.
    const i32 tiles = work.head.tiles, recent = work.run[1].end - work.run[1].begin;
    const i32 recent_end = work.run[1].end - 1, kept_end = work.run[0].end - 1 + recent;
    const auto look_up = [&](i32 n) -> Sm90Place {
      if constexpr (C.paged != 0) n += lane / kBoxes;
      const i32 begin = n < recent ? (recent_end - n) * C.block_n - work.shift : (kept_end - n) * C.block_n;
      if constexpr (C.paged == 0) {
        return {work.k_row + begin, work.k_batch};
      } else {
        if (n >= tiles || lane >= kTogether * kBoxes) return {};
        const i32* const pages = p.page_table + work.batch * p.page_table_stride;
        const u32 row = u32(begin + lane % kBoxes * C.paged), column = launch.page.quotient(row);
        const i32 page = pages[min(i64(column), p.max_pages - 1)];
        return {i32(row - column * launch.page.divisor), max(0, min(page, i32(p.num_pages) - 1))};
      }
    };
    // The elected lane of each warp copies every kWarps-th box. first: the block of a cluster that brings the first
    // panel; they take turns.
    const auto load = [&](const TensorMap& map, u32 to, u32 full, Sm90Boxes from, i32 head, auto dim, int share,
                          u32 first) {
      constexpr int kPanels = panels(dim.value);
      const bool elected = ptx::elect();
      if (elected && leads) ptx::mbarrier_expect_tx(full, u32(C.block_n * kPanels * 128));
#pragma unroll
      for (int n = 0; n < ceil_div(kBoxes, kWarps); ++n) {
        const int box = n * kWarps + share;
        const i32 row = C.paged ? __shfl_sync(0xffffffffu, from.place.row, from.first + box) : from.place.row;
        const i32 batch = C.paged ? __shfl_sync(0xffffffffu, from.place.batch, from.first + box) : from.place.batch;
        if (!elected || box >= kBoxes) continue;
#pragma unroll
        for (int panel = 0; panel < kPanels; ++panel) {
          const u32 place = to + u32((panel * C.block_n + box * C.paged) * 128);
          if constexpr (C.cluster > 1) {
            if ((u32(panel) + first) % 2 == rank_of<C>())
              ptx::tma_load_to_both(place, map, full, panel * 64, row, head, batch);
          } else {
            ptx::tma_load(place, map, full, panel * 64, row, head, batch);
          }
        }
      }
    };
    // Shares differ by a box: the warp with more of K's has fewer of V's.
    const auto load_k = [&](Sm90Boxes from) {
      const u32 stage = k_ring.stage;
      wait_together(shared.k_free(stage), k_ring.parity);
      load(launch.k, shared.k(stage), shared.k_full(stage), from, work.head_k, Int<C.head_dim>{}, share, 0);
      k_ring.advance();
    };
    const auto load_v = [&](Sm90Boxes from) {
      const u32 stage = v_ring.stage;
      wait_together(shared.v_free(stage), v_ring.parity);
      load(launch.v, shared.v(stage), shared.v_full(stage), from, work.head_v, Int<C.head_dim_v>{}, kWarps - 1 - share,
           1);
      v_ring.advance();
    };

    Sm90Boxes last = {};  // of the tile whose V is still to come
    if (tiles > 0) {
      last.place = look_up(0);
      load_k(last);
    }
    if constexpr (kBringsQ) load_q<C>(launch, shared, q_ring, work);
    // The next item is taken while the last tiles wait for a free stage: not sooner, since a block that is still busy
    // must not hold work that an idle one could do, and not later, since finding its tiles takes as long as computing
    // one.
    const i32 early = max(1, tiles - kTilesAhead);
#pragma unroll 1
    for (i32 n = 1;; ++n) {
      if (n == early) {
        if constexpr (kTakes)
          publish(launch, shared, scheduler, item + 1);
        else if (lane == 0)
          ptx::mbarrier_arrive(shared.work_free());
      }
      if (n >= tiles) break;
      // A read of the page table takes long: it is made for many boxes, before a stage is waited for.
      Sm90Boxes next = {last.place, last.first + kBoxes};
      if (kTogether == 1 || next.first == kTogether * kBoxes) next = {look_up(n), 0};
      // In the order in which a consumer needs them.
      if constexpr (C.overlap == 0) load_v(last);
      load_k(next);
      if constexpr (C.overlap != 0) load_v(last);
      last = next;
    }
    if (tiles > 0) load_v(last);
  }
}

}  // namespace strobe
