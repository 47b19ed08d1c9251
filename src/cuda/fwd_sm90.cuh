// Forward for Hopper: FlashAttention-3's division of work (Shah et al., arXiv 2407.08608). A producer warp brings tiles
// by tensor copies; each consumer warpgroup owns 64 rows and multiplies by wgmma, in turns. Inside a warpgroup the
// exponentials of a tile run under the multiplication of the tile before by V (overlap), or else under the other
// warpgroups' multiplications alone: then they need no maximum first, and one turn keeps the tensor cores busy longer.
#pragma once

#include "cuda/fwd_sm90_epilogue.cuh"
#include "cuda/fwd_sm90_producer.cuh"
#include "cuda/tile/gemm_sm90.cuh"
#include "cuda/tile/softmax_sm90.cuh"

namespace strobe {

// Named barriers: 0 is __syncthreads(), then come the turns, then those of one warpgroup each.
constexpr u32 kTurnBarrier = 1, kGroupBarrier = 5;

// What a warpgroup has of its item: nothing, output alone, or also a tile that is still to be multiplied by V.
constexpr u32 kNothing = 0, kOutput = 1, kTile = 2;

// What is known of a step when it is compiled: nothing; that there is no tile before; that there is one; that there is
// one and no mask.
enum Sm90Step { kAnyStep, kFirstStep, kLaterStep, kFullStep };

template <FwdSm90Config C>
__device__ __forceinline__ void consume(const FwdSm90Launch& launch, const Sm90Shared<C>& shared, int warpgroup) {
  constexpr DType kType = DType(C.dtype);
  constexpr int kDepth = round_up_16(C.head_dim), kWidth = round_up_16(C.head_dim_v), kKeys = C.block_n;
  constexpr bool kPlain = !C.softcap;
  constexpr bool kSkips = skips(C);
  constexpr bool kOneStep = one_step(C);
  constexpr bool kJoined = joins_products(C);
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
  // Descriptors. That of keys is asked for before a turn or a product is waited for, and is then worked out there:
  // between that wait and the scores the tensor cores would stand still.
  const auto keys = [&] {
    u64 descriptor = ptx::matrix_descriptor(shared.k(k_ring.stage));
    ptx::opaque(descriptor);
    return descriptor;
  };
  // The descriptors of a wide head would be kept in registers from item to item, which have no room: q is taken as new.
  const auto queries = [](u32 q) {
    if (C.head_dim > 128) ptx::opaque(q);
    return ptx::matrix_descriptor(q);
  };
  const auto values = [&] { return ptx::matrix_descriptor(shared.v(v_ring.stage), kKeys * 128); };
  // A stage is filled in both blocks of a cluster at once, so both are told. No cluster-wide order of memory is needed:
  // what was read has been read, and only copies write there.
  const auto free_stage = [&](u32 barrier) {
    if constexpr (C.cluster > 1) {
      if (lane_id() < C.cluster) ptx::mbarrier_arrive_at(barrier, u32(lane_id()));
    } else {
      if (lane_id() == 0) ptx::mbarrier_arrive(barrier);
    }
  };
  const auto k_release = [&] {
    free_stage(shared.k_free(k_ring.stage));
    k_ring.advance();
  };
  const auto v_release = [&] {
    free_stage(shared.v_free(v_ring.stage));
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
    issue_output<kType>(out, probabilities, values());
    ptx::wgmma_commit();
  };
  clear();

#pragma unroll 1
  for (u32 item = 0;; ++item) {
    ptx::mbarrier_try_wait(shared.q_full(q_ring.stage), q_ring.parity);
    const Sm90Work& work = shared.work(item);
    const auto head = work.head;
    if (head.first_row < 0) break;
    const u32 q = shared.q(q_ring.stage, warpgroup);
    i32 left = head.tiles;
    u32 state = kNothing;
    ptx::opaque(state);  // else the compiler copies the loops for what it knows of an item's first tile

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
    // What lies behind a sequence's keys is multiplied by 0, which NaN survives.
    const auto clear_stale = [&] {
      v_wait();
      const u32 v = shared.v(v_ring.stage) + u32(head.stale) * 128;
#pragma unroll 1
      for (int panel = 0; panel < panels(C.head_dim_v); ++panel)
#pragma unroll 1
        for (int at = int(threadIdx.x % 128); at < (kKeys - head.stale) * 8; at += 128)
          ptx::st_shared_16(v + u32(panel * kKeys * 128 + at * 16), make_uint4(0, 0, 0, 0));
      ptx::fence_proxy_async();
      ptx::bar_sync(kGroupBarrier + u32(warpgroup), 128);
    };
    // Whether there is a tile before.
    const auto begun_before = [&](auto kind) {
      return kind.value == kAnyStep ? state == kTile : kind.value != kFirstStep;
    };
    // What follows a tile's softmax. moves: as Sm90Softmax::update says; begun: whether there was a tile before.
    const auto end_step = [&](bool moves, bool begun) {
      if (moves && (begun || state != kNothing)) softmax.rescale(out);
      if (begun) return;
      if (head.stale < kKeys && left + 1 == head.tiles) clear_stale();
      end_leaving();
      state = kTile;
      ptx::opaque(state);
    };
    // A tile's scores, and under its exponentials the tile before by V, if there is one.
    const auto step_overlapped = [&](i32 tile, bool masked, auto kind) {
      Scores s;
      const u64 k = keys();
      const bool begun = begun_before(kind);
      if (!begun) k_wait();  // else the step before has waited
      turn_wait();
      ptx::pin(out);
      ptx::pin(probabilities);
      ptx::wgmma_fence();
      issue_scores<kType, kDepth, kKeys>(s, queries(q), k);
      ptx::wgmma_commit();
      if (begun) {
        v_wait();
        issue_output<kType>(out, probabilities, values());
        ptx::wgmma_commit();
        turn_pass();
        ptx::wgmma_wait<1>();
      } else {
        turn_pass();
        find_bounds();
        ptx::wgmma_wait<0>();
      }
      ptx::pin(s);
      k_release();
      score(s, tile, masked);
      const bool moves = softmax.update(s, log2_scale, !begun);
      ptx::pin(s);
      // The assembler would move the wait for the output above the exponentials: only control flow holds it back. So
      // the next K is waited for here, although it is needed later, and on a condition that knows the sums of the
      // exponentials. No sum is negative.
      const bool impossible = softmax.sum[0] + softmax.sum[1] < 0.f;
      if ((--left > 0) != impossible) k_wait();
      ptx::wgmma_wait<0>();
      ptx::pin(out);
      ptx::pin(probabilities);
      if (begun) v_release();
      probabilities = to_operand<kType>(s);
      end_step(moves, begun);
    };
    // The same without overlap: the tile before by V, then this one's scores, then their exponentials. What the next
    // multiplication reads is waited for under the one before.
    const auto step_alone = [&](i32 tile, bool masked, auto kind) {
      Scores s;
      const u64 k = keys();
      const bool begun = begun_before(kind);
      const auto end_last = [&] {
        ptx::wgmma_wait<kJoined>();
        ptx::pin(out);
        ptx::pin(probabilities);
      };
      if (!begun) k_wait();
      turn_wait();
      if (begun) {
        issue_last();
        k_wait();
        if (!kJoined) end_last();
      }
      ptx::wgmma_fence();
      issue_scores<kType, kDepth, kKeys>(s, queries(q), k);
      ptx::wgmma_commit();
      turn_pass();
      if (begun) {
        if (kJoined) end_last();
        v_release();
      } else {
        find_bounds();
      }
      v_wait();
      ptx::wgmma_wait<0>();
      ptx::pin(s);
      --left;
      if constexpr (kind.value == kFullStep) {
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
        const bool moves = softmax.update(s, log2_scale, !begun);
        probabilities = to_operand<kType>(s);
        end_step(moves, begun);
      }
    };
    const auto step = [&](i32 tile, bool full, auto kind) {
      const bool masked = kind.value != kFullStep && (kind.value == kLaterStep || !full);
      if constexpr (C.overlap != 0)
        step_overlapped(tile, masked, kind);
      else
        step_alone(tile, masked, kind);
    };
    // The tile before by V alone; kept: and with it the scores of a few kept tokens, which are then the tile before,
    // with probabilities of 0 for the rest of it.
    const auto last_step = [&](bool kept) {
      Fragment<16, kKeptKeys> s;
      const u64 k = kept ? keys() : 0;
      if (kept && !C.overlap) k_wait();  // else the step before has waited
      v_wait();
      if (kept) turn_wait();
      issue_last();
      if (kept) {
        issue_scores<kType, kDepth, kKeys>(s, queries(q), k);
        ptx::wgmma_commit();
        turn_pass();
      }
      ptx::wgmma_wait<0>();
      ptx::pin(out);
      v_release();
      state = kOutput;
      if (kept) {
        ptx::pin(s);
        k_release();
        score(s, 0, true);
        if (softmax.update(s, log2_scale)) softmax.rescale(out);
        const Operand<16, kKeptKeys> few = to_operand<kType>(s);
        probabilities = {};
#pragma unroll
        for (int i = 0; i < 4; ++i) probabilities.x[0][0][i] = few.x[0][0][i];
        --left;
        state = kTile;
      }
      ptx::opaque(state);
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
      bool kept = C.kept && r == 0 && state == kTile && (head.start & kKeptAlone);
      if (kept) tile = seen_begin;
      const i32 full_begin = max(run.full_begin, seen_begin), full_end = max(run.full_end, seen_begin);
      const auto is_full = [&] { return tile >= full_begin && tile < full_end; };
      if constexpr (kOneStep) {
#pragma unroll 1
        while (tile > seen_begin) {
          if constexpr (kPlain) {
            if (state == kTile && tile > full_begin && tile <= full_end) {
#pragma unroll 1
              while (tile > full_begin) step(--tile, true, Int<kFullStep>{});
              continue;
            }
          }
          --tile;
          step(tile, is_full(), Int<kAnyStep>{});
        }
      } else {
        if (state != kTile && tile > seen_begin) {
          --tile;
          step(tile, is_full(), Int<kFirstStep>{});
        }
#pragma unroll 1
        while (tile > seen_begin) {
          const i32 stop = tile > full_end ? full_end : tile > full_begin ? tile : seen_begin;
#pragma unroll 1
          while (tile > stop) step(--tile, false, Int<kLaterStep>{});
#pragma unroll 1
          while (tile > full_begin) step(--tile, true, Int<kFullStep>{});
        }
      }
      // Kept tokens and an item's last tile are multiplied by V at the same place.
#pragma unroll 1
      do {
        if (r == 0 && !kept) {
          end_leaving();  // where the item had no first tile here
          __syncwarp();   // every lane knows of this item
          if constexpr (C.staging != kInPlaceOfQ) q_release(q_ring.stage);
        }
        if (state != kTile || (r > 0 && seen_begin == run.begin)) break;
        last_step(kept);
        kept = false;
      } while (C.kept && state == kTile);
      if (kSkips) skip(seen_begin - run.begin);
    }
    const u32 place = shared.rows(q_ring.stage, warpgroup);
    q_ring.advance();
    float scale[2];
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
      ptx::mbarrier_init_cta(shared.k_free(stage), C.cluster * kWarps);
      ptx::mbarrier_init_cta(shared.v_full(stage), 1);
      ptx::mbarrier_init_cta(shared.v_free(stage), C.cluster * kWarps);
    }
    ptx::fence_mbarrier_init();
  }
  if constexpr (C.cluster > 1)
    ptx::cluster_sync();  // the other block's barriers are there, too
  else
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
  // The other block may still free stages here.
  if constexpr (C.cluster > 1) ptx::cluster_sync();
}

}  // namespace strobe
