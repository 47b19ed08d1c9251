// Forward for Hopper: FlashAttention-3's division of work (Shah et al., arXiv 2407.08608). A producer warp brings tiles
// by tensor copies; each consumer warpgroup owns 64 rows and multiplies by wgmma, in turns. Inside a warpgroup the
// exponentials of a tile run under the multiplication of the tile before by V (overlap), or else under the other
// warpgroups' multiplications alone, which leaves registers for more of them or for wider tiles.
#pragma once

#include "cuda/fwd_sm90_epilogue.cuh"
#include "cuda/fwd_sm90_producer.cuh"
#include "cuda/tile/gemm_sm90.cuh"
#include "cuda/tile/softmax_sm90.cuh"

namespace strobe {

// Named barriers: 0 is __syncthreads(), then come the turns, then those of one warpgroup each.
constexpr u32 kTurnBarrier = 1, kGroupBarrier = 5;

template <FwdSm90Config C>
__device__ __forceinline__ void consume(const FwdSm90Launch& launch, const Sm90Shared<C>& shared, int warpgroup) {
  constexpr DType kType = DType(C.dtype);
  constexpr int kDepth = round_up_16(C.head_dim), kWidth = round_up_16(C.head_dim_v), kKeys = C.block_n;
  constexpr bool kPlain = !C.softcap;
  constexpr bool kSkips = skips(C);
  using Scores = Fragment<16, kKeys>;
  const AttnParams& p = launch.p;
  // Tensor copies take their addresses from registers of the whole warp: a shuffle says that lanes agree.
  const int warp = C.staging == kFromRegisters ? warp_id() : __shfl_sync(0xffffffffu, warp_id(), 0);
  const int row0 = warpgroup * 64 + warp % 4 * 16;  // of this warp
  const float log2_scale = kPlain ? p.scale * kLog2e : 1.f;
  const auto token_of = [&](i32 row) { return C.pack ? i32(launch.group.quotient(u32(row))) : row; };
  Sm90Ring<C.stages> k_ring, v_ring;
  Sm90Ring<C.stages_q> q_ring;
  Sm90Softmax softmax;
  Fragment<16, kWidth> out;
  Operand<16, kKeys> probabilities;  // of the tile before
  bool leaving = false;              // rows of the item before are being copied

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
  const auto q_release = [&](u32 stage) {
    if (lane_id() == 0) ptx::mbarrier_arrive(shared.q_free(stage));
  };
  // Gives their place back.
  const auto end_leaving = [&] {
    if (C.staging == kFromRegisters || !leaving) return;
    if (ptx::elect()) {
      ptx::tma_store_wait_read();
      if constexpr (C.staging == kInPlaceOfQ) ptx::mbarrier_arrive(shared.q_free(q_ring.stage ^ 1));
    }
    leaving = false;
  };
  if (C.pingpong && warpgroup == consumers(C) - 1) turn_pass();

  const auto clear = [&] {
    softmax.clear();
    out.clear();
  };
  // The tile before by V alone.
  const auto issue_last = [&] {
    ptx::pin(out);
    ptx::pin(probabilities);
    ptx::wgmma_fence();
    issue_output<kType>(out, probabilities, shared.v(v_ring.stage));
    ptx::wgmma_commit();
  };
  const auto finish_last = [&] {
    ptx::wgmma_wait<0>();
    ptx::pin(out);
    v_release();
  };
  clear();

#pragma unroll 1
  for (u32 item = 0;; ++item) {
    ptx::mbarrier_try_wait(shared.q_full(q_ring.stage), q_ring.parity);
    const Sm90Work& work = shared.work(item);
    const auto head = work.head;
    const bool more = head.first_row >= 0;
    if (!more) break;
    const u32 q = shared.q(q_ring.stage, warpgroup);
    i32 left = head.tiles;
    bool begun = false;  // whether there is a tile before
    bool fresh = true;   // whether there is no output either

    const auto score = [&](auto& s, i32 tile, bool masked) {
      if constexpr (!kPlain) apply_score<true, false>(s, p.scale, p.softcap, [](int) { return RowBias{}; });
      if (masked) apply_mask(s, tile * kKeys, [&](int r) { return shared.bounds()[row0 + Fragment<16, 8>::row(r)]; });
    };
    // Each warp finds the bounds of its own rows, under a multiplication.
    const auto find_bounds = [&] {
      if ((head.start & 2) && lane_id() < 16) {
        const i32 row = head.first_row + row0 + lane_id();
        shared.bounds()[row0 + lane_id()] = row_keys(work.mask, token_of(row));
      }
      __syncwarp();
    };
    // The first tile: its scores alone.
    const auto begin = [&](i32 tile, bool full, bool stale) {
      Scores s;
      k_wait();
      turn_wait();
      ptx::wgmma_fence();
      issue_scores<kType, kDepth, kKeys>(s, q, shared.k(k_ring.stage));
      ptx::wgmma_commit();
      turn_pass();
      find_bounds();
      if (!C.overlap) v_wait();
      ptx::wgmma_wait<0>();
      ptx::pin(s);
      k_release();
      score(s, tile, !full);
      softmax.update(s, log2_scale, true);
      probabilities = to_operand<kType>(s);
      if (kSkips && !fresh) softmax.rescale(out);
      fresh = false;
      // What lies behind a sequence's keys is multiplied by 0, which NaN survives.
      if (stale) {
        v_wait();
        const u32 v = shared.v(v_ring.stage) + u32(head.stale) * 128;
#pragma unroll 1
        for (int panel = 0; panel < panels(C.head_dim_v); ++panel)
#pragma unroll 1
          for (int at = int(threadIdx.x % 128); at < (kKeys - head.stale) * 8; at += 128)
            ptx::st_shared_16(v + u32(panel * kKeys * 128 + at * 16), make_uint4(0, 0, 0, 0));
        ptx::fence_proxy_async();
        ptx::bar_sync(kGroupBarrier + u32(warpgroup), 128);
      }
      end_leaving();
      if (--left > 0) k_wait();
      begun = true;
    };
    // Any other: its scores, and under its exponentials the tile before by V. masked: an Int, or a bool.
    const auto step = [&](i32 tile, auto masked) {
      Scores s;
      turn_wait();
      ptx::pin(out);
      ptx::pin(probabilities);
      ptx::wgmma_fence();
      issue_scores<kType, kDepth, kKeys>(s, q, shared.k(k_ring.stage));
      ptx::wgmma_commit();
      v_wait();
      issue_output<kType>(out, probabilities, shared.v(v_ring.stage));
      ptx::wgmma_commit();
      turn_pass();
      ptx::wgmma_wait<1>();
      ptx::pin(s);
      k_release();
      score(s, tile, masked);
      const bool moves = softmax.update(s, log2_scale);
      ptx::pin(s);
      // The assembler would move the wait for the output above the exponentials: only control flow holds it back. So
      // the next K is waited for here, although it is needed later, and on a condition that knows the sums of the
      // exponentials. No sum is negative.
      const bool impossible = softmax.sum[0] + softmax.sum[1] < 0.f;
      if ((--left > 0) != impossible) k_wait();
      ptx::wgmma_wait<0>();
      ptx::pin(out);
      ptx::pin(probabilities);
      v_release();
      probabilities = to_operand<kType>(s);
      if (moves) softmax.rescale(out);
    };
    // The same without overlap: the tile before by V, then this one's scores, then their exponentials. What the next
    // multiplication reads is waited for under the one before.
    const auto step_alone = [&](i32 tile, auto masked) {
      Scores s;
      turn_wait();
      issue_last();
      k_wait();
      ptx::wgmma_wait<0>();
      ptx::pin(out);
      ptx::wgmma_fence();
      issue_scores<kType, kDepth, kKeys>(s, q, shared.k(k_ring.stage));
      ptx::wgmma_commit();
      turn_pass();
      v_release();
      v_wait();
      ptx::wgmma_wait<0>();
      ptx::pin(s);
      if constexpr (!masked.value) {
        if (!softmax.add(s, log2_scale, [&] { probabilities = to_operand<kType>(s); })) {
          scores_again<kType, kDepth>(s, q, shared.k(k_ring.stage));
          softmax.update(s, log2_scale, true);
          probabilities = to_operand<kType>(s);
          softmax.rescale(out);
        }
        k_release();
      } else {
        k_release();
        score(s, tile, masked);
        const bool moves = softmax.update(s, log2_scale);
        probabilities = to_operand<kType>(s);
        if (moves) softmax.rescale(out);
      }
      --left;
    };
    const auto take = [&](i32 tile, auto masked) {
      if constexpr (C.overlap != 0)
        step(tile, masked);
      else
        step_alone(tile, masked);
    };
    // A few kept tokens alone: their scores with the tile before by V. As any item's last tile they are left to be
    // multiplied by V, the rest of their tile by probabilities of 0.
    const auto kept_step = [&] {
      Fragment<16, kKeptKeys> s;
      if (!C.overlap) k_wait();  // else the step before has waited
      v_wait();
      turn_wait();
      issue_last();
      issue_scores<kType, kDepth, kKeys>(s, q, shared.k(k_ring.stage));
      ptx::wgmma_commit();
      turn_pass();
      finish_last();
      ptx::pin(s);
      k_release();
      score(s, 0, true);
      if (softmax.update(s, log2_scale)) softmax.rescale(out);
      const Operand<16, kKeptKeys> kept = to_operand<kType>(s);
      probabilities = {};
#pragma unroll
      for (int i = 0; i < 4; ++i) probabilities.x[0][0][i] = kept.x[0][0][i];
      --left;
    };
    // Tiles that none of this warpgroup's rows sees, but others' do: freed, with their turn.
    const auto skip = [&](i32 count) {
#pragma unroll 1
      for (; count > 0; --count, --left) {
        k_wait();
        __syncwarp();  // a lane that is late could sleep through a whole phase of the barrier
        k_release();
        turn_wait();
        turn_pass();
        v_wait();
        __syncwarp();
        v_release();
      }
    };

    i32 first_tile = -1;
    if constexpr (!kSkips) {
      if (left > 0) {
        const auto run = work.run[head.start & 1];
        first_tile = run.end - 1;
        begin(first_tile, first_tile >= run.full_begin && first_tile < run.full_end, head.stale < kKeys);
      }
    }
#pragma unroll 1
    for (int r = head.start & 1; r >= 0; --r) {
      const auto run = work.run[r];
      // Of the item's tiles, those that this warpgroup's rows see.
      i32 seen_begin = run.begin, tile = run.end;
      if constexpr (kSkips && consumers(C) > 1) {
        const auto seen = work.seen[warpgroup][r];
        seen_begin = seen.begin;
        skip(tile - seen.end);
        tile = seen.end;
      }
      if constexpr (C.kept != 0) {
        if (r == 0 && begun && (head.start & kKeptAlone)) {
          kept_step();
          break;
        }
      }
      const i32 full_begin = max(run.full_begin, seen_begin), full_end = max(run.full_end, seen_begin);
      if (kSkips ? !begun && tile > seen_begin : tile == first_tile + 1 && tile > seen_begin) {
        --tile;
        if constexpr (kSkips)
          begin(tile, tile >= full_begin && tile < full_end, head.stale < kKeys && left == head.tiles);
      }
#pragma unroll 1
      while (tile > seen_begin) {
        if constexpr (kPlain) {
          const i32 stop = tile > full_end ? full_end : tile > full_begin ? tile : seen_begin;
#pragma unroll 1
          while (tile > stop) take(--tile, Int<1>{});
#pragma unroll 1
          while (tile > full_begin) take(--tile, Int<0>{});
        } else {
          // A cap is long: two steps with it would take the compiler twice the time, and masking is little beside it.
          --tile;
          take(tile, tile < full_begin || tile >= full_end);
        }
      }
      if (kSkips && seen_begin > run.begin) {
        if (begun) {
          v_wait();
          issue_last();
          finish_last();
          begun = false;
        }
        skip(seen_begin - run.begin);
      }
    }
    end_leaving();  // where the item had no first tile here
    __syncwarp();   // every lane knows of this item
    if constexpr (C.staging != kInPlaceOfQ) q_release(q_ring.stage);
    const u32 place = shared.rows(q_ring.stage, warpgroup);
    q_ring.advance();
    float scale[2];
    if (head.tiles > 0) {
      if (!kSkips || begun) {
        v_wait();
        issue_last();
        finish_last();
      }
    }
    finish_state<C>(scale, softmax, launch, work, row0);
    if constexpr (C.staging == kFromRegisters) {
      write_rows<C>(out, scale, launch, work, row0);
    } else {
      stage_rows<C>(out, scale, launch, work, row0, place);
      leaving = true;
    }
    clear();
  }
  end_leaving();  // shared memory outlives the copies
}

template <FwdSm90Config C>
__global__ __launch_bounds__(threads(C), 1) void fwd_sm90(const __grid_constant__ FwdSm90Launch launch) {
  static_assert(valid(C));
  extern __shared__ __align__(1024) unsigned char smem[];
  const Sm90Shared<C> shared = {smem, ptx::shared_address(smem)};
  const int warpgroup = __shfl_sync(0xffffffffu, int(threadIdx.x / 128), 0);
  if (threadIdx.x == 0) {
    constexpr u32 kWarps = 4 * consumers(C);
    for (u32 stage = 0; stage < C.stages_q; ++stage) {
      ptx::mbarrier_init_cta(shared.q_full(stage), u32(q_telling_lanes(C)));
      ptx::mbarrier_init_cta(shared.q_free(stage), kWarps);
    }
    ptx::mbarrier_init_cta(shared.work_full(), u32(telling_lanes(C)));
    ptx::mbarrier_init_cta(shared.work_free(), producer_warps(C));
    for (u32 stage = 0; stage < C.stages; ++stage) {
      ptx::mbarrier_init_cta(shared.k_full(stage), 1);
      ptx::mbarrier_init_cta(shared.k_free(stage), kWarps);
      ptx::mbarrier_init_cta(shared.v_full(stage), 1);
      ptx::mbarrier_init_cta(shared.v_free(stage), kWarps);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  constexpr int kProducer = first_producer_warp(C) / 4;  // its warpgroup
  if (warpgroup == kProducer) {
    if constexpr (consumers(C) > 1) ptx::setmaxnreg_dec<producer_registers(C)>();
    const int warp = __shfl_sync(0xffffffffu, warp_id(), 0) - first_producer_warp(C);
    if (warp < producer_warps(C))
      produce<C>(launch, shared, warp);
    else if (scouts(C) && warp == producer_warps(C))
      scout<C>(launch, shared);
  } else {
    if constexpr (consumers(C) > 1) ptx::setmaxnreg_inc<consumer_registers(C)>();
    consume<C>(launch, shared, warpgroup - (consumers(C) == 1 ? 0 : 1));
  }
}

}  // namespace strobe
