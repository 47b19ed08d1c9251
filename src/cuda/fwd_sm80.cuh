// Forward for sm_80 and later: FlashAttention-2's loop (Dao, arXiv 2307.08691) on mma.sync, ldmatrix and cp.async. A
// block owns block_m rows, queries of one head or of a packed group of heads, and walks the key tiles that the mask
// gives from right to left. Scores, probabilities and the output never leave registers.
#pragma once

#include "core/config.h"
#include "core/launch.h"
#include "core/mask.h"
#include "core/seqlen.h"
#include "cuda/apply.cuh"
#include "cuda/epilogue.cuh"
#include "cuda/tile/gemm.cuh"
#include "cuda/tile/load.cuh"

namespace strobe {

// The tiles of a walk in the order in which they are loaded: from the last to the first.
struct TileQueue {
  i32 next, begin;           // of the run being loaded
  i32 kept_begin, kept_end;  // the run after it
  i32 left;

  __device__ __forceinline__ explicit TileQueue(const Walk& walk)
      : next(i32(walk.run[1].end)),
        begin(i32(walk.run[1].begin)),
        kept_begin(i32(walk.run[0].begin)),
        kept_end(i32(walk.run[0].end)),
        left(i32(walk.tiles())) {}
  __device__ __forceinline__ i32 take() {
    if (next == begin) next = kept_end, begin = kept_begin;
    --left;
    return --next;
  }
};

// Which rows, heads and keys this block works on.
struct Work {
  i32 first_row;  // packed rows: token * group + head within the group
  i32 slice, split, group, batch;

  __device__ __forceinline__ static Work of(const FwdLaunch& launch, int block_m) {
    u32 n = blockIdx.x;
    // The last rows first: under a causal mask they see the most seq.
    const i32 first_row = i32(launch.m_blocks.divisor - 1 - launch.m_blocks.take(n)) * block_m;
    const i32 slice = i32(launch.slices.take(n)), split = i32(launch.splits.take(n)),
              group = i32(launch.groups.take(n));
    return {first_row, slice, split, group, i32(n)};
  }
};

// Tiles below this do not pay for a split of their own.
constexpr i64 kMinSplitTiles = 2;

template <FwdConfig C>
__global__ __launch_bounds__(threads(C)) void fwd_sm80(const __grid_constant__ FwdLaunch launch) {
  static_assert(valid(C));
  constexpr DType kType = DType(C.dtype);
  constexpr int kThreads = threads(C), kWarpsM = warps_m(C), kWarpsN = warps_n(C);
  constexpr int kRows = C.block_m / kWarpsM, kKeys = C.block_n / kWarpsN;  // of a warp
  constexpr int kDepth = round_up_16(C.head_dim), kDimV = value_slice(C), kWidth = round_up_16(kDimV);
  constexpr bool kPlain = !C.softcap && !C.alibi;
  using QTile = SmemTile<C.block_m, kDepth>;
  using KTile = SmemTile<C.block_n, kDepth>;
  using VTile = SmemTile<C.block_n, kWidth>;
  using OTile = SmemTile<C.block_m, kWidth>;
  using Scores = Fragment<kRows, kKeys>;
  using Output = Fragment<kRows, kWidth>;

  extern __shared__ __align__(1024) unsigned char smem[];
  const AttnParams& p = launch.p;
  const Work work = Work::of(launch, C.block_m);
  SeqInfo seq = SeqInfo::of(p, work.batch);
  if constexpr (!C.paged) seq.pages = nullptr;  // known when compiled: k_index() needs no division
  const i32 group = C.pack ? i32(launch.group.divisor) : 1;
  const auto token_of = [&](i32 row) { return C.pack ? i32(launch.group.quotient(u32(row))) : row; };
  const i32 first_token = token_of(work.first_row);
  if (first_token >= seq.rows_q) return;
  const i32 head0 = work.group * group;
  const i32 hk = i32(launch.heads_per_k.quotient(u32(head0))), hv = i32(launch.heads_per_v.quotient(u32(head0)));
  const auto head_of = [&](i32 row, i32 token) { return C.pack ? head0 + row - token * group : head0; };

  const u32 shared = ptx::shared_address(smem);
  const QTile sQ{shared};
  const u32 shared_k = shared + u32(query_bytes(C)), shared_v = shared_k + u32(C.stages * key_bytes(C));
  RowKeys* const bounds = reinterpret_cast<RowKeys*>(smem + tile_bytes(C));
  // Kept for the end, where registers are free again.
  SeqInfo* const shared_seq = reinterpret_cast<SeqInfo*>(smem + tile_bytes(C) + bounds_bytes(C));
  if (threadIdx.x == 0) *shared_seq = seq;
  const int warp_m = warp_id() % kWarpsM, warp_n = warp_id() / kWarpsM;

  const u16* const q_base = static_cast<const u16*>(p.q.data) + seq.q_index(p.q, first_token, head0);
  const i32 seqlen_q = i32(seq.seqlen_q);
  load_tile<kThreads, C.head_dim, true>(sQ, [&](int r) -> const u16* {
    const i32 token = token_of(work.first_row + r);
    if (token >= seqlen_q) return nullptr;
    return q_base + (token - first_token) * p.q.row_stride +
           (head_of(work.first_row + r, token) - head0) * p.q.head_stride;
  });
  ptx::cp_async_commit();

  const Mask mask = mask_of(p, seq);
  Walk walk = mask.visit(first_token, token_of(work.first_row + C.block_m - 1) + 1, C.block_n);
  if constexpr (C.split) {
    const i64 share = max(kMinSplitTiles, ceil_div<i64>(walk.tiles(), i64(launch.splits.divisor)));
    walk = split(walk, work.split * share, (work.split + 1) * share);
  }

  // Element 0 of key row 0 in K and V; with pages, of the head.
  const u16* const k_base =
      static_cast<const u16*>(p.k.data) + (C.paged ? hk * p.k.head_stride : seq.k_index(p.k, 0, hk));
  const u16* const v_base = static_cast<const u16*>(p.v.data) + work.slice * kDimV +
                            (C.paged ? hv * p.v.head_stride : seq.k_index(p.v, 0, hv));
  const i32 seqlen_k = i32(seq.seqlen_k);
  const auto row_pointer = [&](const u16* base, const Rows& rows, i32 j) {
    if constexpr (!C.paged) return base + j * rows.row_stride;
    const u32 row = u32(j + i32(seq.leftpad)), column = launch.page.quotient(row);
    const i32 in_page = i32(row - column * launch.page.divisor);
    const i32 page = seq.pages[min(i64(column), seq.max_pages - 1)];
    return base + i64(max(0, min(page, i32(seq.num_pages) - 1))) * rows.batch_stride + in_page * rows.row_stride;
  };
  // Only the last tile of a sequence reaches beyond its keys, and it can only be the first one loaded.
  const auto load_k = [&](i32 tile, int stage, auto bounded) {
    const i32 first = tile * C.block_n;
    load_tile<kThreads, C.head_dim, bounded.value>(KTile{shared_k + stage * u32(key_bytes(C))}, [&](int r) {
      return !bounded.value || first + r < seqlen_k ? row_pointer(k_base, p.k, first + r) : nullptr;
    });
  };
  const auto load_v = [&](i32 tile, int stage, auto bounded) {
    const i32 first = tile * C.block_n;
    load_tile<kThreads, kDimV, bounded.value>(VTile{shared_v + stage * u32(value_bytes(C))}, [&](int r) {
      return !bounded.value || first + r < seqlen_k ? row_pointer(v_base, p.v, first + r) : nullptr;
    });
  };

  RunningSoftmax<kRows / 8> rows;
  Output out;
  rows.clear();
  out.clear();
  const float log2_scale = kPlain ? p.scale * kLog2e : 1.f;  // from units of the scores to those of the exponent

  TileQueue queue(walk);
  if (queue.left > 0) {
    // Group t of asynchronous copies holds what step t multiplies: K of tile t, and V of that tile or of the one
    // before.
    const i32 first_tile = queue.take();
    i32 v_tile = first_tile;  // the next of V to load
    bool v_left = true;
    load_k(first_tile, 0, Bool<true>{});
    if constexpr (C.stages > 1 && !C.overlap) load_v(first_tile, 0, Bool<true>{});
    ptx::cp_async_commit();
    const auto load_group = [&](int k_stage, int v_stage, auto bounded) {
      if constexpr (C.overlap) {
        if (v_left) load_v(v_tile, v_stage, bounded);
        v_left = queue.left > 0;
      }
      if (queue.left > 0) {
        v_tile = queue.take();
        load_k(v_tile, k_stage, Bool<false>{});
        if constexpr (!C.overlap) load_v(v_tile, v_stage, Bool<false>{});
      }
      ptx::cp_async_commit();
    };
    // One V alone: whole, or the last of the sequence.
    const auto load_v_alone = [&] {
      if (v_tile == first_tile)
        load_v(v_tile, 0, Bool<true>{});
      else
        load_v(v_tile, 0, Bool<false>{});
      ptx::cp_async_commit();
    };
    if constexpr (C.stages > 1) {
      if constexpr (C.overlap) load_group(1, 0, Bool<true>{});
#pragma unroll
      for (int t = 1 + C.overlap; t < C.stages - 1 + C.overlap; ++t) load_group(t, t - C.overlap, Bool<false>{});
    }
#pragma unroll 1
    for (int r = int(threadIdx.x); r < C.block_m; r += kThreads)
      bounds[r] = row_keys(mask, token_of(work.first_row + r));

    // Of each of this lane's rows: what ALiBi adds to it.
    RowBias bias[C.alibi ? kRows / 8 : 1];
    if constexpr (C.alibi) {
#pragma unroll
      for (int r = 0; r < kRows / 8; ++r) {
        const i32 row = work.first_row + warp_m * kRows + Scores::row(r), token = token_of(row);
        const i64 h = min(head_of(row, token), i32(p.num_heads) - 1);
        bias[r].slope = p.alibi_slopes ? p.alibi_slopes[work.batch * p.alibi_batch_stride + h] * kLog2e : 0.f;
        bias[r].origin = float(token + i32(mask.off()));
      }
    }
    const Dropout dropout = {p.seed, p.offset, keep_threshold(p.dropout_p)};

    const u32 q_lane = QTile::moved(lane_address_m(sQ), warp_m * kRows, 0);
    const u32 k_lane = KTile::moved(lane_address_k(KTile{shared_k}), warp_n * kKeys, 0);
    const u32 v_lane = VTile::moved(lane_address_m(VTile{shared_v}), warp_n * kKeys, 0);
    Operand<kRows, kDepth> q;             // where Q stays in registers
    Operand<kRows, kKeys> probabilities;  // of the tile before
    int k_stage = 0, v_stage = 0;
    const auto next_stage = [](int stage) { return C.stages == 1 || stage == C.stages - 1 ? 0 : stage + 1; };

    const auto multiply_values = [&] {
      const u32 v_at = v_lane + u32(v_stage) * u32(value_bytes(C));
      gemm<kType, kKeys>(
          out,
          [&](int k, u32(&a)[kRows / 16][4]) {
#pragma unroll
            for (int m = 0; m < kRows / 16; ++m)
#pragma unroll
              for (int e = 0; e < 4; ++e) a[m][e] = probabilities.x[m][k][e];
          },
          [&](int k, int n, u32(&b)[4]) { ptx::ldmatrix_x4_trans(b, VTile::moved(v_at, k * 16, n * 16)); });
      v_stage = next_stage(v_stage);
    };

    // Scores and probabilities of one tile, and its share of the output. With `overlap` that of the tile before comes
    // in between instead: its multiplication keeps the tensor cores busy during the exponentials.
    const auto step = [&](i32 tile, auto masked, auto is_first) {
      constexpr bool kFirst = is_first.value;
      const i32 first = tile * C.block_n + warp_n * kKeys;
      // This step's tiles have arrived for every warp, and no warp still reads those of the step before.
      ptx::cp_async_wait<C.stages == 1 ? 0 : kFirst && C.overlap ? C.stages - 1 : C.stages - 2>();
      __syncthreads();
      if constexpr (C.stages == 1) {
        if constexpr (!C.overlap) v_tile = tile;
        if constexpr (!kFirst || !C.overlap) load_v_alone();
        v_tile = tile;
      } else if constexpr (!kFirst || !C.overlap) {
        load_group(k_stage == 0 ? C.stages - 1 : k_stage - 1, v_stage == 0 ? C.stages - 1 : v_stage - 1, Bool<false>{});
      }
      Scores s;
      s.clear();
      const u32 k_at = k_lane + u32(k_stage) * u32(key_bytes(C));
      gemm<kType, kDepth>(
          s,
          [&](int k, u32(&a)[kRows / 16][4]) {
#pragma unroll
            for (int m = 0; m < kRows / 16; ++m) {
              if constexpr (C.q_in_registers) {
#pragma unroll
                for (int e = 0; e < 4; ++e) a[m][e] = q.x[m][k][e];
              } else {
                ptx::ldmatrix_x4(a[m], QTile::moved(q_lane, m * 16, k * 16));
              }
            }
          },
          [&](int k, int n, u32(&b)[4]) { ptx::ldmatrix_x4(b, KTile::moved(k_at, n * 16, k * 16)); });
      k_stage = next_stage(k_stage);
      if constexpr (C.stages == 1) {
        // V has arrived for every warp, and no warp still reads K.
        ptx::cp_async_wait<0>();
        __syncthreads();
        if (queue.left > 0) load_k(queue.take(), 0, Bool<false>{});
        ptx::cp_async_commit();
      }

      if constexpr (!kPlain)
        apply_score<C.softcap != 0, C.alibi != 0>(
            s, p.scale, p.softcap, [&](int r) { return RowBias{bias[r].slope, bias[r].origin - float(first)}; });
      if constexpr (masked.value) apply_mask(s, first, [&](int r) { return bounds[warp_m * kRows + Scores::row(r)]; });
      float now[kRows / 8], added[kRows / 8];
      const bool moves = rows.references(s, log2_scale, now);
      if (!C.overlap && moves) rows.move(out, log2_scale, now);
      rows.exponentiate(s, log2_scale, now, added);
      if constexpr (C.dropout)
        apply_dropout(s, dropout, work.batch * p.num_heads + head0, work.first_row + warp_m * kRows, first);
      if constexpr (C.overlap && !kFirst) multiply_values();
      if (C.overlap && moves) rows.move(out, log2_scale, now);
#pragma unroll
      for (int r = 0; r < kRows / 8; ++r) rows.sum[r] += added[r];
      probabilities = to_operand<kType>(s);
      if constexpr (!C.overlap) multiply_values();
    };

    if constexpr (C.q_in_registers) {
      ptx::cp_async_wait<max(C.stages - 1, 1)>();
      __syncthreads();
#pragma unroll
      for (int m = 0; m < kRows / 16; ++m)
#pragma unroll
        for (int k = 0; k < kDepth / 16; ++k) ptx::ldmatrix_x4(q.x[m][k], QTile::moved(q_lane, m * 16, k * 16));
    }
    if constexpr (C.overlap) step(first_tile, Bool<true>{}, Bool<true>{});
#pragma unroll 1
    for (int r = 1; r >= 0; --r) {
      const Run& run = r == 1 ? walk.run[1] : walk.run[0];
      const i32 begin = i32(run.begin), full_begin = i32(run.full_begin), full_end = i32(run.full_end);
      i32 tile = i32(run.end);
      if (C.overlap && tile == first_tile + 1 && tile > begin) --tile;  // done
#pragma unroll 1
      while (tile > begin) {
        const i32 stop = tile > full_end ? full_end : tile > full_begin ? tile : begin;
#pragma unroll 1
        while (tile > stop) step(--tile, Bool<true>{}, Bool<false>{});
#pragma unroll 1
        while (tile > full_begin) step(--tile, Bool<false>{}, Bool<false>{});
      }
    }
    if constexpr (C.overlap) {
      if constexpr (C.stages == 1) {
        __syncthreads();  // no warp still reads V of the tile before
        load_v_alone();
      }
      ptx::cp_async_wait<0>();
      __syncthreads();
      multiply_values();
    }
  }

  ptx::cp_async_wait<0>();
  __syncthreads();  // every warp is done with the tiles: their place is free
  const SeqInfo& ends = *shared_seq;
#pragma unroll
  for (int r = 0; r < kRows / 8; ++r) rows.sum[r] = row_sum(rows.sum[r]);
  if constexpr (kWarpsN > 1) {
    merge_warps<kWarpsM, kWarpsN>(out, rows, log2_scale, warp_m, warp_n, reinterpret_cast<float*>(smem));
    __syncthreads();
    if (warp_n > 0) return;
  }

  const float to_natural = kPlain ? p.scale : kLn2;
  const i32 warp_row = work.first_row + warp_m * kRows;
  const i32 used_q = i32(ends.seqlen_q), rows_q = i32(ends.rows_q);
  if constexpr (C.split) {
#pragma unroll
    for (int r = 0; r < kRows / 8; ++r) {
      const i32 row = warp_row + Output::row(r), token = token_of(row);
      if (token >= used_q) continue;
      const i64 at = (work.split * p.num_heads + head_of(row, token)) * p.total_q + global_row(p, ends, token);
      if (lane_id() % 4 == 0 && work.slice == 0) {
        launch.partial_state[at * 2] = rows.max[r] == kNegInfinity ? kNegInfinity : rows.max[r] * to_natural;
        launch.partial_state[at * 2 + 1] = rows.sum[r];
      }
      if (rows.sum[r] == 0.f) continue;  // the merge does not read it
      float* to = launch.partial_out + at * C.head_dim_v + work.slice * kDimV;
#pragma unroll
      for (int c = 0; c < Output::kCols; c += 2)
        if (Output::col(c) < kDimV)
          *reinterpret_cast<float2*>(to + Output::col(c)) = make_float2(out.at(r, c), out.at(r, c + 1));
    }
  } else {
    // The four lanes that share rows finish one row each.
    const int mine = lane_id() % 4 % (kRows / 8);
    RowState state;
#pragma unroll
    for (int r = 0; r < kRows / 8; ++r)
      if (r == mine) state = {rows.max[r] == kNegInfinity ? kNegInfinity : rows.max[r] * to_natural, rows.sum[r]};
    const i32 row = warp_row + Output::row(mine), token = token_of(row);
    const i64 h = head_of(row, token);
    RowResult result = {0.f, kInfinity};
    if (token < used_q) result = finalize(state, p.s_aux ? p.s_aux + h : nullptr);
    if (p.lse && token < rows_q && lane_id() % 4 == mine && work.slice == 0)
      p.lse[ends.lse_index(p, token, h)] = result.lse;
    if constexpr (C.dropout) result.scale *= 1.f / (1.f - p.dropout_p);
#pragma unroll
    for (int r = 0; r < kRows / 8; ++r) {
      const float scale = __shfl_sync(0xffffffffu, result.scale, r, 4);
      // A row that saw nothing is 0 whatever lies in out.
#pragma unroll
      for (int c = 0; c < Output::kCols; ++c) out.at(r, c) = scale == 0.f ? 0.f : out.at(r, c) * scale;
    }
    u16* const out_base = static_cast<u16*>(p.out.data) + ends.q_index(p.out, first_token, head0) + work.slice * kDimV;
    store_rows<kType, kDimV>(out, OTile{shared}, warp_m * kRows, [&](int r) -> u16* {
      const i32 token = token_of(work.first_row + r);
      if (token >= rows_q) return nullptr;
      return out_base + (token - first_token) * p.out.row_stride +
             (head_of(work.first_row + r, token) - head0) * p.out.head_stride;
    });
  }
}

}  // namespace strobe
