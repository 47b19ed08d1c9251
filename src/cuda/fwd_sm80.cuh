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

// The tiles of a walk by number, 0 for the leftmost, as they lie in shared memory: loops then need little in registers.
struct TileOrder {
  i32 tiles, kept, kept_shift, window_shift;
  i32 edge[4];  // full tiles: [edge[1], edge[0]) of the window, [edge[3], edge[2]) of the kept tokens

  __device__ __forceinline__ explicit TileOrder(const Walk& walk) : tiles(i32(walk.tiles())) {
    const Run &first = walk.run[0], &second = walk.run[1];
    kept = i32(first.end - first.begin), kept_shift = i32(first.begin), window_shift = i32(second.begin) - kept;
    edge[0] = i32(second.full_end) - window_shift, edge[1] = i32(second.full_begin) - window_shift;
    edge[2] = i32(first.full_end) - kept_shift, edge[3] = i32(first.full_begin) - kept_shift;
  }
  __device__ __forceinline__ i32 tile(i32 number) const {
    const i32 a = kept_shift, b = window_shift;
    return number + (number >= kept ? b : a);
  }
  // Where the loop that begins with tile number - 1 ends, and whether its tiles are full.
  __device__ __forceinline__ i32 stop(i32 number, bool& full) const {
    full = false;
#pragma unroll
    for (int e = 0; e < 4; ++e, full = !full)
      if (number > edge[e]) return edge[e];
    return 0;
  }
};

// A compile-time number handed to a lambda.
template <int kValue>
struct Int {
  static constexpr int value = kValue;
};

// Which rows, heads and keys this block works on.
struct Work {
  i32 first_row;                  // packed rows: token * group + head within the group
  i32 slice, split, head, batch;  // head: the first of the group

  __device__ __forceinline__ static Work of(const FwdLaunch& launch, int block_m, i32 group) {
    u32 n = blockIdx.x;
    // The last rows first: under a causal mask they see the most seq.
    const i32 first_row = i32(launch.m_blocks.divisor - 1 - launch.m_blocks.take(n)) * block_m;
    const i32 slice = i32(launch.slices.take(n)), split = i32(launch.splits.take(n));
    const i32 head = i32(launch.groups.take(n)) * group;
    return {first_row, slice, split, head, i32(n)};
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
  // A warp multiplies masked tiles in parts and leaves out those that none of its rows sees.
  constexpr int kPart = kKeys % 32 == 0 && (C.stages > 1 || kRows > 16) ? 32 : kKeys;
  using QTile = SmemTile<C.block_m, kDepth>;
  using KTile = SmemTile<C.block_n, kDepth>;
  using VTile = SmemTile<C.block_n, kWidth>;
  using OTile = SmemTile<C.block_m, kWidth>;
  using Output = Fragment<kRows, kWidth>;

  extern __shared__ __align__(1024) unsigned char smem[];
  const AttnParams& p = launch.p;
  const i32 group = C.pack ? i32(launch.group.divisor) : 1;
  const Work work = Work::of(launch, C.block_m, group);
  SeqInfo seq = SeqInfo::of(p, work.batch);
  if constexpr (!C.paged) seq.pages = nullptr;  // known when compiled: k_index() needs no division
  const auto token_of = [&](i32 row) { return C.pack ? i32(launch.group.quotient(u32(row))) : row; };
  const i32 first_token = token_of(work.first_row);
  if (first_token >= seq.rows_q) return;
  const i32 hk = i32(launch.heads_per_k.quotient(u32(work.head)));
  const i32 hv = i32(launch.heads_per_v.quotient(u32(work.head)));
  // From the group's first head to the row's.
  const auto head_in_group = [&](i32 row, i32 token) { return C.pack ? row - token * i32(launch.group.divisor) : 0; };

  const u32 shared = ptx::shared_address(smem);
  const QTile sQ{shared};
  const u32 shared_k = shared + u32(query_bytes(C)), shared_v = shared_k + u32(C.stages * key_bytes(C));
  RowKeys* const bounds = reinterpret_cast<RowKeys*>(smem + tile_bytes(C));
  RowKeys* const warp_bounds = bounds + C.block_m;
  // Kept for the end, where registers are free again.
  struct Kept {
    SeqInfo seq;
    TileOrder order;
    Work work;
    const u16 *k, *v;  // of the head: element 0 of key 0, or of page 0
  };
  static_assert(sizeof(Kept) <= kSequenceBytes);
  Kept* const kept = reinterpret_cast<Kept*>(smem + tile_bytes(C) + bounds_bytes(C));
  const int warp_m = warp_id() % kWarpsM, warp_n = warp_id() / kWarpsM;

  const u16* const q_base = static_cast<const u16*>(p.q.data) + seq.q_index(p.q, first_token, work.head);
  const i32 seqlen_q = i32(seq.seqlen_q);
  load_tile<kThreads, C.head_dim, true>(sQ, [&](int r) -> const u16* {
    const i32 token = token_of(work.first_row + r);
    if (token >= seqlen_q) return nullptr;
    return q_base + (token - first_token) * p.q.row_stride + head_in_group(work.first_row + r, token) * p.q.head_stride;
  });
  ptx::cp_async_commit();

  const Mask mask = mask_of(p, seq);
  Walk walk = mask.visit(first_token, token_of(work.first_row + C.block_m - 1) + 1, C.block_n);
  if constexpr (C.split) {
    const i64 share = max(kMinSplitTiles, ceil_div<i64>(walk.tiles(), i64(launch.splits.divisor)));
    walk = split(walk, work.split * share, (work.split + 1) * share);
  }

  if (threadIdx.x == 0) {
    const u16* const k = static_cast<const u16*>(p.k.data);
    const u16* const v = static_cast<const u16*>(p.v.data) + work.slice * kDimV;
    *kept = {seq, TileOrder(walk), work, k + (C.paged ? hk * p.k.head_stride : seq.k_index(p.k, 0, hk)),
             v + (C.paged ? hv * p.v.head_stride : seq.k_index(p.v, 0, hv))};
  }
  __syncthreads();

  const i32 seqlen_k = i32(seq.seqlen_k);
  const auto paged_row = [&](const u16* base, const Rows& rows, i32 j) {
    const u32 row = u32(j + i32(seq.leftpad)), column = launch.page.quotient(row);
    const i32 in_page = i32(row - column * launch.page.divisor);
    const i32 page = seq.pages[min(i64(column), seq.max_pages - 1)];
    return base + i64(max(0, min(page, i32(seq.num_pages) - 1))) * rows.batch_stride + in_page * rows.row_stride;
  };
  // This thread's first chunk of a tile.
  const auto source_k = [&](i32 tile) {
    return C.paged ? kept->k : row_source<KTile, kThreads>(kept->k, tile * C.block_n, p.k.row_stride);
  };
  const auto source_v = [&](i32 tile) {
    return C.paged ? kept->v : row_source<VTile, kThreads>(kept->v, tile * C.block_n, p.v.row_stride);
  };
  // Only the last tile of a sequence reaches beyond its keys: it is masked, and can only be the first one loaded.
  const auto load_k = [&](const u16* from, i32 tile, int stage, auto bounded) {
    const i32 first = tile * C.block_n;
    const KTile to{shared_k + stage * u32(key_bytes(C))};
    if constexpr (C.paged)
      load_tile<kThreads, C.head_dim, bounded.value>(to, [&](int r) {
        return !bounded.value || first + r < seqlen_k ? paged_row(from, p.k, first + r) : nullptr;
      });
    else
      load_rows<kThreads, C.head_dim, bounded.value>(to, from, p.k.row_stride, seqlen_k - first);
  };
  const auto load_v = [&](const u16* from, i32 tile, int stage, auto bounded) {
    const i32 first = tile * C.block_n;
    const VTile to{shared_v + stage * u32(value_bytes(C))};
    if constexpr (C.paged)
      load_tile<kThreads, kDimV, bounded.value>(to, [&](int r) {
        return !bounded.value || first + r < seqlen_k ? paged_row(from, p.v, first + r) : nullptr;
      });
    else
      load_rows<kThreads, kDimV, bounded.value>(to, from, p.v.row_stride, seqlen_k - first);
  };

  RunningSoftmax<kRows / 8> rows;
  Output out;
  rows.clear();
  out.clear();
  const float log2_scale = kPlain ? launch.log2_scale : 1.f;  // from units of the scores to those of the exponent

  const TileOrder& order = kept->order;
  i32 number = order.tiles;  // of the last tile that was multiplied
  if (number > 0) {
    // Group t of asynchronous copies holds what step t multiplies: K and V of tile t. With one stage they take turns.
    const auto load_group = [&](i32 which, int stage, auto bounded) {
      if (bounded.value || which >= 0) {
        const i32 tile = order.tile(which);
        load_k(source_k(tile), tile, stage, bounded);
        if constexpr (C.stages > 1) load_v(source_v(tile), tile, stage, bounded);
      }
      ptx::cp_async_commit();
    };
    // Of the next tile to multiply. Two stages need no counter of their own.
    int stage = C.stages == 2 ? (number - 1) & 1 : 0;
    load_group(number - 1, stage, Bool<true>{});
#pragma unroll
    for (int t = 1; t < C.stages - 1; ++t) load_group(number - 1 - t, t, Bool<false>{});

    if (warp_n == 0) {
      RowKeys all = {0, 0x7fffffff, 0, 0};
#pragma unroll 1
      for (int r = lane_id(); r < kRows; r += 32) {
        const RowKeys keys = row_keys(mask, token_of(work.first_row + warp_m * kRows + r));
        bounds[warp_m * kRows + r] = keys;
        all.kept_end = max(all.kept_end, keys.kept_end);
        if (keys.begin < keys.end) all.begin = min(all.begin, keys.begin);
        all.end = max(all.end, keys.end);
      }
      all.kept_end = __reduce_max_sync(0xffffffffu, all.kept_end);
      all.begin = __reduce_min_sync(0xffffffffu, all.begin);
      all.end = __reduce_max_sync(0xffffffffu, all.end);
      if (lane_id() == 0) warp_bounds[warp_m] = all;
    }

    // Of each of this lane's rows: what ALiBi adds to it.
    RowBias bias[C.alibi ? kRows / 8 : 1] = {};
    if constexpr (C.alibi) {
#pragma unroll
      for (int r = 0; r < kRows / 8; ++r) {
        const i32 row = work.first_row + warp_m * kRows + Output::row(r), token = token_of(row);
        const i64 h = min(work.head + head_in_group(row, token), i32(p.num_heads) - 1);
        bias[r].slope = p.alibi_slopes ? p.alibi_slopes[work.batch * p.alibi_batch_stride + h] * kLog2e : 0.f;
        bias[r].origin = float(token + i32(mask.off()));
      }
    }
    const Dropout dropout = {p.seed, p.offset, keep_threshold(p.dropout_p)};

    Operand<kRows, kDepth> q;  // where Q stays in registers

    // Scores and probabilities of this warp's rows and kWide keys from `first` on, and their share of the output.
    // `meanwhile` comes between the two multiplications, also where the warp does not `see` any of the keys.
    const auto attend = [&](auto wide, u32 q_at, u32 k_at, u32 v_at, i32 first, bool sees, auto masked,
                            auto meanwhile) {
      constexpr int kWide = wide.value;
      Fragment<kRows, kWide> s;
      s.clear();
      if (sees)
        gemm<kType, kDepth>(
            s,
            [&](int k, u32(&a)[kRows / 16][4]) {
#pragma unroll
              for (int m = 0; m < kRows / 16; ++m) {
                if constexpr (C.q_in_registers) {
#pragma unroll
                  for (int e = 0; e < 4; ++e) a[m][e] = q.x[m][k][e];
                } else {
                  ptx::ldmatrix_x4(a[m], QTile::moved(q_at, m * 16, k * 16));
                }
              }
            },
            [&](int k, int n, u32(&b)[4]) { ptx::ldmatrix_x4(b, KTile::moved(k_at, n * 16, k * 16)); });
      meanwhile();
      if (!sees) return;

      if constexpr (!kPlain)
        apply_score<C.softcap != 0, C.alibi != 0>(
            s, p.scale, p.softcap, [&](int r) { return RowBias{bias[r].slope, bias[r].origin - float(first)}; });
      if constexpr (masked.value) apply_mask(s, first, [&](int r) { return bounds[warp_m * kRows + Output::row(r)]; });
      float now[kRows / 8], added[kRows / 8];
      if (rows.references(s, log2_scale, now)) rows.move(out, log2_scale, now);
      rows.exponentiate(s, log2_scale, now, added);
      if constexpr (C.dropout)
        apply_dropout(s, dropout, work.batch * p.num_heads + work.head, work.first_row + warp_m * kRows, first);
#pragma unroll
      for (int r = 0; r < kRows / 8; ++r) rows.sum[r] += added[r];
      const Operand<kRows, kWide> probabilities = to_operand<kType>(s);
      gemm<kType, kWide>(
          out,
          [&](int k, u32(&a)[kRows / 16][4]) {
#pragma unroll
            for (int m = 0; m < kRows / 16; ++m)
#pragma unroll
              for (int e = 0; e < 4; ++e) a[m][e] = probabilities.x[m][k][e];
          },
          [&](int k, int n, u32(&b)[4]) { ptx::ldmatrix_x4_trans(b, VTile::moved(v_at, k * 16, n * 16)); });
    };

    const auto step = [&](auto masked) {
      --number;
      if constexpr (C.stages == 2) stage = number & 1;
      // Plus 0, which no compiler knows: addresses are cheap to compute again, and not worth registers.
      const u32 thread = threadIdx.x + (u32(number) >> 31);
      const int lane = int(thread % 32), warp = int(thread / 32), m0 = warp % kWarpsM * kRows,
                n0 = warp / kWarpsM * kKeys;
      const u32 q_at = QTile::moved(lane_address_m(sQ, lane), m0, 0);
      const u32 k_at = KTile::moved(lane_address_k(KTile{shared_k + u32(stage) * u32(key_bytes(C))}, lane), n0, 0);
      const u32 v_at = VTile::moved(lane_address_m(VTile{shared_v + u32(stage) * u32(value_bytes(C))}, lane), n0, 0);
      // What this step begins to load: with one stage V of its own tile, else both of a later one.
      const i32 coming = C.stages == 1 ? number : number - (C.stages - 1), coming_tile = order.tile(coming);
      [[maybe_unused]] const u16* const k_source = source_k(coming_tile);
      const u16* const v_source = source_v(coming_tile);
      // This step's tiles have arrived for every warp, and no warp still reads those of the step before.
      ptx::cp_async_wait<max(C.stages - 2, 0)>();
      __syncthreads();
      if constexpr (C.stages == 1) {
        load_v(v_source, coming_tile, 0, masked);
      } else if (coming >= 0) {
        const int free_stage = C.stages == 2 ? 1 - stage : stage == 0 ? C.stages - 1 : stage - 1;
        load_k(k_source, coming_tile, free_stage, Bool<false>{});
        load_v(v_source, coming_tile, free_stage, Bool<false>{});
      }
      ptx::cp_async_commit();

      // With one stage: V has arrived for every warp; and no warp still reads K.
      const auto wait_for_v = [&] {
        if constexpr (C.stages == 1) {
          ptx::cp_async_wait<0>();
          __syncthreads();
        }
      };
      const auto load_next_k = [&] {
        if constexpr (C.stages == 1) load_group(number - 1, 0, Bool<false>{});
      };
      const i32 first = order.tile(number) * C.block_n + warp_n * kKeys;
      if constexpr (!masked.value) {
        attend(Int<kKeys>{}, q_at, k_at, v_at, first, true, masked, [&] {
          wait_for_v();
          load_next_k();
        });
      } else {
        const RowKeys seen = warp_bounds[warp_m];
        if constexpr (kPart < kKeys) wait_for_v();
#pragma unroll 1
        for (int part = kKeys - kPart; part >= 0; part -= kPart) {
          const i32 begin = first + part;
          const bool sees = begin < seen.kept_end || (begin < seen.end && begin + kPart > seen.begin);
          attend(Int<kPart>{}, q_at, k_at + u32(part * KTile::kPanel * 2), v_at + u32(part * VTile::kPanel * 2), begin,
                 sees, masked, [&] {
                   if constexpr (kPart == kKeys) {
                     wait_for_v();
                     load_next_k();
                   }
                 });
        }
        if constexpr (kPart < kKeys && C.stages == 1) {
          __syncthreads();
          load_next_k();
        }
      }
      if constexpr (C.stages > 2) stage = stage == C.stages - 1 ? 0 : stage + 1;
    };

    if constexpr (C.q_in_registers) {
      ptx::cp_async_wait<max(C.stages - 1, 1)>();
      __syncthreads();
      const u32 q_at = QTile::moved(lane_address_m(sQ), warp_m * kRows, 0);
#pragma unroll
      for (int m = 0; m < kRows / 16; ++m)
#pragma unroll
        for (int k = 0; k < kDepth / 16; ++k) ptx::ldmatrix_x4(q.x[m][k], QTile::moved(q_at, m * 16, k * 16));
    }
#pragma unroll 1
    while (number > 0) {
      bool full;
      const i32 stop = order.stop(number, full);
      if (full) {
#pragma unroll 1
        while (number > stop) step(Bool<false>{});
      } else {
#pragma unroll 1
        while (number > stop) step(Bool<true>{});
      }
    }
  }

  ptx::cp_async_wait<0>();
  __syncthreads();  // every warp is done with the tiles: their place is free
  const SeqInfo& ends = kept->seq;
  const Work& done = kept->work;
#pragma unroll
  for (int r = 0; r < kRows / 8; ++r) rows.sum[r] = row_sum(rows.sum[r]);
  if constexpr (kWarpsN > 1) {
    merge_warps<kWarpsM, kWarpsN>(out, rows, log2_scale, warp_m, warp_n, reinterpret_cast<float*>(smem));
    __syncthreads();
    if (warp_n > 0) return;
  }

  const float to_natural = kPlain ? p.scale : kLn2;
  const i32 warp_row = done.first_row + warp_m * kRows;
  const i32 used_q = i32(ends.seqlen_q), rows_q = i32(ends.rows_q);
  if constexpr (C.split) {
#pragma unroll
    for (int r = 0; r < kRows / 8; ++r) {
      const i32 row = warp_row + Output::row(r), token = token_of(row);
      if (token >= used_q) continue;
      const i64 at =
          (done.split * p.num_heads + done.head + head_in_group(row, token)) * p.total_q + global_row(p, ends, token);
      if (lane_id() % 4 == 0 && done.slice == 0) {
        launch.partial_state[at * 2] = rows.max[r] == kNegInfinity ? kNegInfinity : rows.max[r] * to_natural;
        launch.partial_state[at * 2 + 1] = rows.sum[r];
      }
      if (rows.sum[r] == 0.f) continue;  // the merge does not read it
      float* to = launch.partial_out + at * C.head_dim_v + done.slice * kDimV;
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
    const i64 h = done.head + head_in_group(row, token);
    RowResult result = {0.f, kInfinity};
    if (token < used_q) result = finalize(state, p.s_aux ? p.s_aux + h : nullptr);
    if (p.lse && token < rows_q && lane_id() % 4 == mine && done.slice == 0)
      p.lse[ends.lse_index(p, token, h)] = result.lse;
    if constexpr (C.dropout) result.scale *= 1.f / (1.f - p.dropout_p);
#pragma unroll
    for (int r = 0; r < kRows / 8; ++r) {
      const float scale = __shfl_sync(0xffffffffu, result.scale, r, 4);
      // A row that saw nothing is 0 whatever lies in out.
#pragma unroll
      for (int c = 0; c < Output::kCols; ++c) out.at(r, c) = scale == 0.f ? 0.f : out.at(r, c) * scale;
    }
    const i32 first_token = token_of(done.first_row);
    u16* const out_base =
        static_cast<u16*>(p.out.data) + ends.q_index(p.out, first_token, done.head) + done.slice * kDimV;
    store_rows<kType, kDimV>(out, OTile{shared}, warp_m * kRows, [&](int r) -> u16* {
      const i32 token = token_of(done.first_row + r);
      if (token >= rows_q) return nullptr;
      return out_base + (token - first_token) * p.out.row_stride +
             head_in_group(done.first_row + r, token) * p.out.head_stride;
    });
  }
}

}  // namespace strobe
