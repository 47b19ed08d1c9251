// What a warp-specialised Hopper kernel waits on and copies with: transaction barriers, tensor copies, named barriers,
// register reallocation. Sections are those of the PTX ISA manual.
#pragma once

#include "core/launch_sm90.h"

namespace strobe::ptx {

// "mbarrier.init", and "membar / fence: fence.mbarrier_init" before other threads use one.
__device__ __forceinline__ void mbarrier_init_cta(u32 barrier, u32 arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// True in one lane, always the same, of a warp whose lanes all ask. Tensor copies belong behind it: behind any other
// condition the compiler does not see that one lane alone comes there, and builds a loop over lanes. "elect.sync".
__device__ __forceinline__ bool elect() {
  u32 elected;
  asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.b32 %0, 1, 0, p;\n}" : "=r"(elected));
  return elected != 0;
}

// Arrives and announces bytes that copies will bring. "mbarrier.arrive: .expect_tx".
__device__ __forceinline__ void mbarrier_expect_tx(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void mbarrier_arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Waits for the phase of this parity to end; the thread may sleep. "mbarrier.try_wait".
__device__ __forceinline__ void mbarrier_try_wait(u32 barrier, u32 parity) {
  asm volatile(
      "{\n.reg .pred p;\nWAIT:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@p bra DONE;\nbra "
      "WAIT;\nDONE:\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// "Data Movement and Conversion Instructions: prefetch".
__device__ __forceinline__ void prefetch_tensormap(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(reinterpret_cast<u64>(&map)) : "memory");
}
// A box to shared memory; what lies outside of the tensor arrives as zeros. "cp.async.bulk.tensor".
__device__ __forceinline__ void tma_load(u32 shared, const TensorMap& map, u32 barrier, i32 c0, i32 c1, i32 c2,
                                         i32 c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];" ::"r"(shared),
      "l"(reinterpret_cast<u64>(&map)), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}

// The same to the same place of both blocks of a cluster, whose barriers at that place are both told.
// "cp.async.bulk.tensor: .multicast::cluster".
__device__ __forceinline__ void tma_load_to_both(u32 shared, const TensorMap& map, u32 barrier, i32 c0, i32 c1, i32 c2,
                                                 i32 c3) {
  constexpr u16 kBoth = 3;
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, "
      "{%3, %4, %5, %6}], [%2], %7;" ::"r"(shared),
      "l"(reinterpret_cast<u64>(&map)), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "h"(kBoth)
      : "memory");
}

// Blocks of a cluster: an arrival at a barrier of block `rank`, and a wait of all their threads for each other. "mapa",
// "barrier.cluster".
__device__ __forceinline__ void mbarrier_arrive_at(u32 barrier, u32 rank) {
  asm volatile(
      "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\nmbarrier.arrive.shared::cluster.b64 _, "
      "[there];\n}" ::"r"(barrier),
      "r"(rank)
      : "memory");
}
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive;\nbarrier.cluster.wait;" ::: "memory");
}

// A box from shared memory; what lies outside of the tensor is not written. A thread waits for the reads of the
// copies that it has committed. "cp.async.bulk.commit_group", "cp.async.bulk.wait_group".
__device__ __forceinline__ void tma_store(const TensorMap& map, u32 shared, i32 c0, i32 c1, i32 c2, i32 c3) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(
                   reinterpret_cast<u64>(&map)),
               "r"(shared), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
               : "memory");
}
__device__ __forceinline__ void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
__device__ __forceinline__ void tma_store_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

// Makes this thread's writes to shared memory visible to wgmma and tensor copies. "fence.proxy.async".
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// "bar: bar.sync, bar.arrive".
__device__ __forceinline__ void bar_sync(u32 id, u32 threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void bar_arrive(u32 id, u32 threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// "Miscellaneous Instructions: setmaxnreg".
template <int kRegisters>
__device__ __forceinline__ void setmaxnreg_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void setmaxnreg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace strobe::ptx
