// Forward for Hopper: FlashAttention-3's division of work (Shah et al., arXiv 2407.08608). A producer warp brings tiles
// by tensor copies; each consumer warpgroup owns 64 rows and multiplies by wgmma. Inside a warpgroup the exponentials
// of a tile run under the multiplication of the tile before by V; two warpgroups take turns with the tensor cores.
#pragma once

#include "cuda/fwd_sm90_epilogue.cuh"
#include "cuda/fwd_sm90_producer.cuh"
#include "cuda/tile/gemm_sm90.cuh"
#include "cuda/tile/softmax_sm90.cuh"

namespace strobe {

// Named barriers: 0 is __syncthreads(), then come the turns, then those of one warpgroup each.
constexpr u32 kTurnBarrier = 1, kGroupBarrier = 4;

template <FwdSm90Config C>
__device__ __forceinline__ void consume(const FwdSm90Launch& launch, const Sm90Shared<C>& shared, int warpgroup) {
  constexpr DType kType = DType(C.dtype);
  constexpr int kDepth = round_up_16(C.head_dim), kWidth = round_up_16(C.head_dim_v), kKeys = C.block_n;
  constexpr bool kPlain = !C.softcap;
  using Scores = Fragment<16, kKeys>;
  const AttnParams& p = launch.p;
  const int row0 = warpgroup * 64 + warp_id() % 4 * 16;  // of this warp
  const float log2_scale = kPlain ? p.scale * kLog2e : 1.f;
  const u32 q = shared.q(warpgroup);
  Sm90Ring<C.stages> k_ring, v_ring;

  const auto turn_wait = [&] {
    if constexpr (C.pingpong) ptx::bar_sync(kTurnBarrier + u32(warpgroup), 256);
  };
  const auto turn_pass = [&] {
    if constexpr (C.pingpong)
      ptx::bar_arrive(kTurnBarrier + u32(warpgroup + 1 == consumers(C) ? 0 : warpgroup + 1), 256);
  };
  const auto k_wait = [&] { ptx::mbarrier_try_wait(shared.k_full(k_ring.stage), k_ring.parity); };
  const auto v_wait = [&] { ptx::mbarrier_try_wait(shared.v_full(v_ring.stage), v_ring.parity); };
  const auto k_release = [&] {
    if (lane_id() == 0) ptx::mbarrier_arrive(shared.k_free(k_ring.stage));
    k_ring.advance();
  };
  const auto v_release = [&] {
    if (lane_id() == 0) ptx::mbarrier_arrive(shared.v_free(v_ring.stage));
    v_ring.advance();
  };
  if (C.pingpong && warpgroup == consumers(C) - 1) turn_pass();

#pragma unroll 1
  for (u32 item = 0;; ++item) {
    ptx::mbarrier_try_wait(shared.q_full(), item & 1);
    const Sm90Work& work = shared.work(item);
    if (work.first_row < 0) break;
    Sm90Softmax softmax;
    Fragment<16, kWidth> out;
    Operand<16, kKeys> probabilities;  // of the tile before
    softmax.rows.clear();
    out.clear();
    i32 left = work.tiles;

    const auto score = [&](Scores& s, i32 tile, auto masked) {
      if constexpr (!kPlain) apply_score<true, false>(s, p.scale, p.softcap, [](int) { return RowBias{}; });
      if constexpr (masked.value)
        apply_mask(s, tile * kKeys, [&](int r) { return shared.bounds()[row0 + Scores::row(r)]; });
    };
    const auto step = [&](i32 tile, auto masked) {
      Scores s;
      turn_wait();
      ptx::pin(out);
      ptx::pin(probabilities);
      ptx::wgmma_fence();
      issue_scores<kType, kDepth>(s, q, shared.k(k_ring.stage));
      ptx::wgmma_commit();
      v_wait();
      issue_output<kType>(out, probabilities, shared.v(v_ring.stage));
      ptx::wgmma_commit();
      turn_pass();
      ptx::wgmma_wait<1>();
      ptx::pin(s);
      k_release();
      score(s, tile, masked);
      const bool moves = softmax.update<false>(s, log2_scale);
      ptx::pin(s);
      // The assembler would move the wait for the output above the exponentials: only control flow holds it back. So
      // the next K is waited for here, although it is needed later, and on a condition that knows the sums of the
      // exponentials. No sum is negative.
      const bool impossible = softmax.rows.sum[0] + softmax.rows.sum[1] < 0.f;
      if ((--left > 0) != impossible) k_wait();
      ptx::wgmma_wait<0>();
      ptx::pin(out);
      ptx::pin(probabilities);
      v_release();
      probabilities = to_operand<kType>(s);
      if (moves) softmax.rescale(out);
    };

    if (left > 0) {
      const i32 first_tile = (work.end[1] > work.begin[1] ? work.end[1] : work.end[0]) - 1;
      {
        Scores s;
        k_wait();
        turn_wait();
        ptx::wgmma_fence();
        issue_scores<kType, kDepth>(s, q, shared.k(k_ring.stage));
        ptx::wgmma_commit();
        turn_pass();
        // Each warp finds the bounds of its own rows meanwhile.
        if (lane_id() < 16) {
          const i32 row = work.first_row + row0 + lane_id();
          shared.bounds()[row0 + lane_id()] = row_keys(work.mask, C.pack ? i32(launch.group.quotient(u32(row))) : row);
        }
        __syncwarp();
        ptx::wgmma_wait<0>();
        ptx::pin(s);
        k_release();
        score(s, first_tile, Int<1>{});
        softmax.update<true>(s, log2_scale);
        probabilities = to_operand<kType>(s);
      }
      // What lies behind a sequence's keys is multiplied by 0, which NaN survives.
      if (work.stale < kKeys) {
        v_wait();
        const u32 v = shared.v(v_ring.stage) + u32(work.stale) * 128;
#pragma unroll 1
        for (int panel = 0; panel < panels(C.head_dim_v); ++panel)
#pragma unroll 1
          for (int at = int(threadIdx.x % 128); at < (kKeys - work.stale) * 8; at += 128)
            ptx::st_shared_16(v + u32(panel * kKeys * 128 + at * 16), make_uint4(0, 0, 0, 0));
        ptx::fence_proxy_async();
        ptx::bar_sync(kGroupBarrier + u32(warpgroup), 128);
      }
      if (--left > 0) k_wait();
#pragma unroll 1
      for (int r = 1; r >= 0; --r) {
        const i32 begin = work.begin[r], full_begin = work.full_begin[r], full_end = work.full_end[r];
        i32 tile = work.end[r];
        if (tile == first_tile + 1 && tile > begin) --tile;  // done
#pragma unroll 1
        while (tile > begin) {
          const i32 stop = tile > full_end ? full_end : tile > full_begin ? tile : begin;
#pragma unroll 1
          while (tile > stop) step(--tile, Int<1>{});
#pragma unroll 1
          while (tile > full_begin) step(--tile, Int<0>{});
        }
      }
    }
    __syncwarp();  // every lane knows of this item
    if (lane_id() == 0) ptx::mbarrier_arrive(shared.q_free());
    if (work.tiles > 0) {
      v_wait();
      turn_wait();
      ptx::pin(out);
      ptx::pin(probabilities);
      ptx::wgmma_fence();
      issue_output<kType>(out, probabilities, shared.v(v_ring.stage));
      ptx::wgmma_commit();
      turn_pass();
      ptx::wgmma_wait<0>();
      ptx::pin(out);
      v_release();
    }
    finish_rows<C>(out, softmax.rows, launch, work, row0);
  }
}

template <FwdSm90Config C>
__global__ __launch_bounds__(threads(C), 1) void fwd_sm90(const __grid_constant__ FwdSm90Launch launch) {
  static_assert(valid(C));
  extern __shared__ __align__(1024) unsigned char smem[];
  const Sm90Shared<C> shared = {smem, ptx::shared_address(smem)};
  const int warpgroup = __shfl_sync(0xffffffffu, int(threadIdx.x / 128), 0);
  if (threadIdx.x == 0) {
    constexpr u32 kWarps = 4 * consumers(C);
    ptx::mbarrier_init_cta(shared.q_full(), 1);
    ptx::mbarrier_init_cta(shared.q_free(), kWarps);
    for (u32 stage = 0; stage < C.stages; ++stage) {
      ptx::mbarrier_init_cta(shared.k_full(stage), 1);
      ptx::mbarrier_init_cta(shared.k_free(stage), kWarps);
      ptx::mbarrier_init_cta(shared.v_full(stage), 1);
      ptx::mbarrier_init_cta(shared.v_free(stage), kWarps);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (warpgroup == 0) {
    if constexpr (consumers(C) > 1) ptx::setmaxnreg_dec<producer_registers(C)>();
    if (threadIdx.x < 32) produce<C>(launch, shared);
  } else {
    if constexpr (consumers(C) > 1) ptx::setmaxnreg_inc<consumer_registers(C)>();
    consume<C>(launch, shared, warpgroup - 1);
  }
}

}  // namespace strobe
