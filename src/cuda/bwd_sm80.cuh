// The backward pass but for its ends: dK and dV of a block of keys in registers, dQ added up in memory.
//
//   P = exp(score - LSE)    dV = P^T dO    dS = P * (dO V^T - delta)    dK = dS^T Q    dQ = dS K
//
// A block takes the keys of one K/V head pair and, one after another, the query heads that read both; tiles of queries
// come backwards. Scores are computed transposed (rows are keys), so that P^T and dS^T are what dV and dK multiply from
// the left: a warp's own queries from registers, those of its neighbours through shared memory.
#pragma once

#include "core/launch_bwd.h"
#include "core/philox.h"
#include "cuda/bwd_scores.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/memory.cuh"
#include "cuda/tile/bwd_tile.cuh"

namespace strobe {

template <BwdConfig C>
struct BwdMain {
  static_assert(valid(C));
  static constexpr DType kType = DType(C.dtype);
  static constexpr int kThreads = threads(C), kM = C.block_m, kN = C.block_n;
  static constexpr int kD = bwd_round16(C.head_dim), kDv = bwd_round16(C.head_dim_v);
  static constexpr bool kSharesP = bwd_shares_p(C), kOneBarrier = C.stages_p == 2;
  static constexpr BwdSmem kSmem = bwd_smem(C);

  // A warp's part of each product: rows, columns or 16-column blocks, whether the last warp has fewer.
  static constexpr int kAcross = C.warps / C.warps_n, kAcrossQ = C.warps / C.warps_dq;
  static constexpr int kRows = kN / C.warps_n, kCols = kM / kAcross;
  static constexpr int kBlocksK = ceil_div(kD / 16, kAcross), kBlocksV = ceil_div(kDv / 16, kAcross);
  static constexpr bool kRaggedK = kD / 16 % kAcross != 0, kRaggedV = kDv / 16 % kAcross != 0;
  static constexpr int kRowsQ = kM / C.warps_dq, kBlocksQ = ceil_div(kD / 16, kAcrossQ);
  static constexpr bool kRaggedQ = kD / 16 % kAcrossQ != 0;

  using KTile = PaddedTile<kN, kD>;
  using VTile = PaddedTile<kN, kDv>;
  using QTile = PaddedTile<kM, kD>;
  using DOTile = PaddedTile<kM, kDv>;
  using ScoreTile = PaddedTile<kN, kM>;  // P^T or dS^T
  using Scores = Fragment<kRows, kCols>;
  using Left = Operand<kRows, kCols>;
  template <int kBlocks>
  using Gradient = Fragment<kRows, kBlocks * 16>;
  using LoadQ = RowLoader<QTile, kThreads>;
  using LoadDO = RowLoader<DOTile, kThreads>;

  // A tile of queries: its number, head and run of the walk, and its place in stats and dq_acc.
  struct Tile {
    i32 m, head, run, at;
  };

  // In shared memory. The walk is that of the block's keys.
  struct State {
    SeqInfo seq;
    Mask mask;
    i64 first_q_tile;
    i32 seqlen_q;
    i32 begin[2], count[2], full_begin[2], full_end[2];
  };
  static_assert(sizeof(State) <= kBwdStateBytes);

  const BwdLaunch& l;
  const BackwardParams& b;
  const AttnParams& p;
  const State& state;
  const SeqInfo& seq;
  const i32 n_block, head0;
  const u32 smem;
  const int warp = warp_id(), lane = lane_id();

  __device__ __forceinline__ BwdMain(const BwdLaunch& launch, unsigned char* shared)
      : l(launch),
        b(launch.p),
        p(launch.p.fwd),
        state(*reinterpret_cast<const State*>(shared + kSmem.state)),
        seq(state.seq),
        n_block(i32(blockIdx.x)),
        head0(i32(blockIdx.y * launch.heads_per_block)),
        smem(ptx::shared_address(shared)) {
    if (threadIdx.x == 0) {
      State& s = *reinterpret_cast<State*>(shared + kSmem.state);
      s.seq = SeqInfo::of(p, blockIdx.z);
      s.mask = mask_of(p, s.seq);
      s.seqlen_q = i32(s.seq.seqlen_q);
      s.first_q_tile = l.first_q_tile(s.seq, kM);
      const Walk walk = s.mask.visit_queries(i64(n_block) * kN, i64(n_block) * kN + kN, kM);
      for (int r = 0; r < 2; ++r) {
        s.begin[r] = i32(walk.run[r].begin);
        s.count[r] = i32(walk.run[r].end - walk.run[r].begin);
        s.full_begin[r] = i32(walk.run[r].full_begin);
        s.full_end[r] = i32(walk.run[r].full_end);
      }
    }
    if (kOneBarrier && threadIdx.x < 2) ptx::mbarrier_init(smem + kSmem.ready + threadIdx.x * 8, kThreads);
    __syncthreads();  // the state is written, and so are the barriers
  }

  // What comes next from memory: tiles backwards, for each head. Pointers are this thread's.
  struct Prefetch {
    Tile tile;
    i32 begin;  // of the run
    const u16 *q, *dout;
  };

  __device__ __forceinline__ void seek(Prefetch& f, i32 head, i32 run) const {
    f.begin = state.begin[run];
    f.tile = {f.begin + state.count[run] - 1, head, run, 0};
    f.tile.at = i32((head0 + head) * l.q_tiles + state.first_q_tile) + f.tile.m;
    const i64 row = i64(f.tile.m) * kM;
    f.q = static_cast<const u16*>(p.q.data) + seq.q_index(p.q, row + LoadQ::row(), head0 + head) + LoadQ::chunk() * 8;
    f.dout = static_cast<const u16*>(b.dout.data) + seq.q_index(b.dout, row + LoadDO::row(), head0 + head) +
             LoadDO::chunk() * 8;
  }
  __device__ __forceinline__ void advance(Prefetch& f) const {
    if (--f.tile.m >= f.begin) {
      --f.tile.at;
      f.q -= kM * p.q.row_stride;
      f.dout -= kM * b.dout.row_stride;
    } else if (f.tile.run == 1 && state.count[0] > 0) {
      seek(f, f.tile.head, 0);
    } else {
      seek(f, f.tile.head + 1, state.count[1] > 0);
    }
  }

  __device__ __forceinline__ void load_keys() const {
    using LoadK = RowLoader<KTile, kThreads>;
    using LoadV = RowLoader<VTile, kThreads>;
    const i64 row = i64(n_block) * kN;
    const int rows = int(min<i64>(kN, max<i64>(0, seq.seqlen_k - row)));
    const i64 hk = head0 / (p.num_heads / p.num_heads_k), hv = head0 / (p.num_heads / p.num_heads_v);
    const u16 *k = static_cast<const u16*>(p.k.data), *v = static_cast<const u16*>(p.v.data);
    LoadK::template load<C.head_dim>(smem + kSmem.k, k + seq.k_index(p.k, row + LoadK::row(), hk) + LoadK::chunk() * 8,
                                     p.k.row_stride, rows, k);
    LoadV::template load<C.head_dim_v>(
        smem + kSmem.v, v + seq.k_index(p.v, row + LoadV::row(), hv) + LoadV::chunk() * 8, p.v.row_stride, rows, v);
  }
  __device__ __forceinline__ void load_q(const Prefetch& f, int stage) const {
    LoadQ::template load<C.head_dim>(smem + kSmem.q + stage * QTile::kBytes, f.q, p.q.row_stride,
                                     state.seqlen_q - f.tile.m * kM, static_cast<const u16*>(p.q.data));
    const float* stats = l.stats + i64(f.tile.at) * (2 * kM);
    for (int i = int(threadIdx.x); i < kM / 2; i += kThreads)
      ptx::cp_async_16(smem + kSmem.stats + u32((stage * kM / 2 + i) * 16), stats + i * 4);
  }
  __device__ __forceinline__ void load_do(const Prefetch& f, int stage) const {
    LoadDO::template load<C.head_dim_v>(smem + kSmem.dout + stage * DOTile::kBytes, f.dout, b.dout.row_stride,
                                        state.seqlen_q - f.tile.m * kM, static_cast<const u16*>(b.dout.data));
  }

  // The queries that see each key, for tiles with a masked pair.
  __device__ __forceinline__ void store_seen() const {
    for (int j = int(threadIdx.x); j < kN; j += kThreads) {
      const Queries q = state.mask.queries(i64(n_block) * kN + j);
      ptx::st_shared_16(smem + kSmem.seen + j * 16,
                        make_uint4(u32(q.begin), u32(q.end), u32(q.full_begin), u32(q.full_end)));
    }
  }

  // This warp's rows and columns of S^T.
  __device__ __forceinline__ int row() const { return warp / kAcross * kRows; }
  __device__ __forceinline__ int col() const { return warp % kAcross * kCols; }

  __device__ __forceinline__ Scores make_s(int stage) const {
    Scores s;
    s.clear();
    gemm<kType, KTile, false, QTile, false, kD, false>(
        s, lane_address<KTile>(smem + kSmem.k, row(), 0),
        lane_address_swapped<QTile>(smem + kSmem.q + stage * QTile::kBytes, col(), 0), 0);
    return s;
  }
  __device__ __forceinline__ Scores make_dp(int stage) const {
    Scores dp;
    dp.clear();
    gemm<kType, VTile, false, DOTile, false, kDv, false>(
        dp, lane_address<VTile>(smem + kSmem.v, row(), 0),
        lane_address_swapped<DOTile>(smem + kSmem.dout + stage * DOTile::kBytes, col(), 0), 0);
    return dp;
  }

  __device__ __forceinline__ BwdScores<C> scores_of(const Tile& tile, int stage) const {
    return {p,
            seq,
            head0 + tile.head,
            tile.m * kM + col(),
            n_block * kN + row(),
            smem + kSmem.stats + u32(stage * 2 * kM + col()) * 4,
            smem + kSmem.seen + u32(row() * 16)};
  }
  using Kept = typename BwdScores<C>::template Kept<kRows, kCols>;

  // S^T and dP^T become P^T and dS^T (without the scale of the scores).
  __device__ __forceinline__ void apply_scores(const Tile& tile, int stage, Scores& s, Scores& dp,
                                               const Kept& kept) const {
    const BwdScores<C> f = scores_of(tile, stage);
    if (tile.m < state.full_begin[tile.run] || tile.m >= state.full_end[tile.run])
      f.template apply<true>(s, dp, kept);
    else
      f.template apply<false>(s, dp, kept);
  }

  __device__ __forceinline__ void store_left(u32 tile, const Left& x) const {
    const u32 to = tile + u32((row() + lane / 4) * ScoreTile::kStride + (col() + lane % 4 * 2) * 2);
#pragma unroll
    for (int m = 0; m < kRows / 16; ++m)
#pragma unroll
      for (int k = 0; k < kCols / 16; ++k)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          ptx::st_shared_4(to + u32((m * 16 + e % 2 * 8) * ScoreTile::kStride + (k * 16 + e / 2 * 8) * 2),
                           x.x[m][k][e]);
  }

  // dV += P^T dO or dK += dS^T Q, over this warp's queries and over those of its neighbours.
  template <class TileB, bool kRagged, int kBlocks, int kAll>
  __device__ __forceinline__ void add_own(Gradient<kBlocks>& x, const Left& left, u32 right) const {
    const int block = warp % kAcross * kBlocks;
    gemm<kType, TileB, true, kRagged>(x, left, lane_address<TileB>(right, col(), block * 16), kAll - block);
  }
  template <class TileB, bool kRagged, int kBlocks, int kAll>
  __device__ __forceinline__ void add_others(Gradient<kBlocks>& x, u32 left, u32 right) const {
    const int block = warp % kAcross * kBlocks;
#pragma unroll
    for (int o = 1; o < kAcross; ++o) {
      const int from = (warp + o) % kAcross * kCols;
      gemm<kType, ScoreTile, false, TileB, true, kCols, kRagged>(
          x, lane_address<ScoreTile>(left, row(), from), lane_address<TileB>(right, from, block * 16), kAll - block);
    }
  }

  // dQ = dS K of a tile, added to the accumulator.
  __device__ __forceinline__ void add_dq(const Tile& tile, u32 ds) const {
    const int row = warp / kAcrossQ * kRowsQ, block = warp % kAcrossQ * kBlocksQ;
    Fragment<kRowsQ, kBlocksQ * 16> dq;
    dq.clear();
    gemm<kType, ScoreTile, true, KTile, true, kN, kRaggedQ>(dq, lane_address_swapped<ScoreTile>(ds, 0, row),
                                                            lane_address<KTile>(smem + kSmem.k, 0, block * 16),
                                                            kD / 16 - block);
    float* acc = l.dq_acc + tile.at * l.dq_tile + warp * (kRowsQ * kBlocksQ * 16);
    u32* turn = nullptr;
    u32 mine = 0;
    if constexpr (C.deterministic) {
      // A warp of every block adds to the same part of the tile, so that warps, not blocks, wait for one another. Those
      // waited for belong to blocks that were started earlier.
      turn = l.turns + i64(tile.at) * C.warps + warp;
      mine = u32(rank(state.mask.visit(i64(tile.m) * kM, i64(tile.m) * kM + kM, kN), n_block));
      while (ptx::ld_acquire(turn) != mine) __nanosleep(20);
      __syncwarp();
    }
#pragma unroll
    for (int mi = 0; mi < kRowsQ / 16; ++mi)
#pragma unroll
      for (int n = 0; n < kBlocksQ * 2; ++n) {
        if (kRaggedQ && n / 2 >= kD / 16 - block) break;
        const int piece = mi * kBlocksQ * 2 + n;
        if constexpr (C.deterministic) {
          float x[4];
#pragma unroll
          for (int e = 0; e < 4; ++e) x[e] = __ldcg(acc + dq_slot(piece, e));
#pragma unroll
          for (int e = 0; e < 4; ++e) __stcg(acc + dq_slot(piece, e), x[e] + dq.x[mi][n][e]);
        } else {
#if __CUDA_ARCH__ >= 900
          ptx::red_add_v4(acc + dq_slot(piece, 0), dq.x[mi][n]);
#else
#pragma unroll
          for (int e = 0; e < 4; ++e) ptx::red_add(acc + dq_slot(piece, e), dq.x[mi][n][e]);
#endif
        }
      }
    if constexpr (C.deterministic) {
      __threadfence();
      __syncwarp();
      if (lane == 0) ptx::st_release(turn, mine + 1);
    }
  }

  // A block's rows of dk or dv, or its part of them.
  template <int kDim, int kBlocks>
  __device__ __forceinline__ void write(const Gradient<kBlocks>& x, float scale, const Rows& out, i64 per_head,
                                        float* parts) const {
    const int row0 = row(), col0 = warp % kAcross * kBlocks * 16;
    u16* to = static_cast<u16*>(out.data);
    if (parts)
      parts += ((head0 / l.heads_per_block) * l.k_tiles + bwd_first_k_tile(p, seq, l.max_k_tiles, kN) + n_block) *
               i64(kN * kDim);
#pragma unroll
    for (int m = 0; m < kRows / 16; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int r = row0 + m * 16 + h * 8 + lane / 4;
        const i64 j = i64(n_block) * kN + r;
        if (j >= seq.rows_k - seq.leftpad) continue;
        u16* row_to = parts ? nullptr : to + seq.k_index(out, j, head0 / per_head);
#pragma unroll
        for (int n = 0; n < kBlocks * 2; ++n) {
          const int col = col0 + n * 8 + lane % 4 * 2;
          if (col >= kDim) continue;
          const float x0 = x.x[m][n][2 * h] * scale, x1 = x.x[m][n][2 * h + 1] * scale;
          if (parts)
            *reinterpret_cast<float2*>(parts + i64(r) * kDim + col) = make_float2(x0, x1);
          else
            *reinterpret_cast<u32*>(row_to + col) = ptx::cvt_pair<kType>(x0, x1);
        }
      }
  }

  // Padding on the left has no gradient.
  template <int kDim>
  __device__ __forceinline__ void clear_leftpad(const Rows& out, i64 per_head) const {
    for (i64 at = threadIdx.x; at < min(seq.leftpad, seq.rows_k) * (kDim / 8); at += kThreads) {
      const i64 j = at / (kDim / 8) - seq.leftpad;
      u16* to = static_cast<u16*>(out.data) + seq.k_index(out, j, head0 / per_head) + at % (kDim / 8) * 8;
      *reinterpret_cast<uint4*>(to) = make_uint4(0, 0, 0, 0);
    }
  }

  __device__ __forceinline__ void run() const {
    Gradient<kBlocksK> dk;
    Gradient<kBlocksV> dv;
    dk.clear();
    dv.clear();
    const i32 total = (state.count[0] + state.count[1]) * i32(l.heads_per_block);
    if (total > 0) loop(total, dk, dv);
    const i64 per_k = p.num_heads / p.num_heads_k, per_v = p.num_heads / p.num_heads_v;
    write<C.head_dim, kBlocksK>(dk, p.scale, b.dk, per_k, l.dk_parts);
    write<C.head_dim_v, kBlocksV>(dv, 1.f, b.dv, per_v, l.dv_parts);
    if (seq.leftpad > 0 && n_block == 0) {
      if (!l.dk_parts) clear_leftpad<C.head_dim>(b.dk, per_k);
      if (!l.dv_parts) clear_leftpad<C.head_dim_v>(b.dv, per_v);
    }
  }

  __device__ __forceinline__ void loop(i32 total, Gradient<kBlocksK>& dk, Gradient<kBlocksV>& dv) const {
    const u32 ready = smem + kSmem.ready;
    Prefetch next;
    seek(next, 0, state.count[1] > 0);
    load_keys();
    load_q(next, 0);
    load_do(next, 0);
    store_seen();
    ptx::cp_async_wait_all();
    __syncthreads();  // keys, what sees them, and the first tile are there
#pragma unroll 1
    for (i32 it = 0; it < total; ++it) {
      const int stage_q = C.stages_q == 2 ? it % 2 : 0, stage_do = C.stages_do == 2 ? it % 2 : 0;
      const int stage_p = C.stages_p == 2 ? it % 2 : 0;
      const u32 sQ = smem + kSmem.q + stage_q * QTile::kBytes, sDO = smem + kSmem.dout + stage_do * DOTile::kBytes;
      const u32 sP = smem + kSmem.p + stage_p * ScoreTile::kBytes, sDS = smem + kSmem.ds + stage_p * ScoreTile::kBytes;
      const bool more = it + 1 < total;
      const Tile tile = next.tile;
      if (more) advance(next);
      if (it > 0) {
        if constexpr (kOneBarrier) {
          ptx::mbarrier_wait(ready + stage_q * 8, u32(it - 1) / 2 % 2);
        } else {
          ptx::cp_async_wait_all();
          __syncthreads();  // the tile is there, and nobody reads the one before it any more
        }
      }

      Kept kept;
      if constexpr (C.dropout) kept = scores_of(tile, stage_q).template draw<kRows, kCols>();
      Scores s = make_s(stage_q);
      if (!kOneBarrier && C.stages_q == 2 && more) load_q(next, stage_q ^ 1);
      if (!kOneBarrier && C.stages_do == 2 && more) load_do(next, stage_do ^ 1);
      Scores dp = make_dp(stage_do);
      apply_scores(tile, stage_q, s, dp, kept);
      const Left p_own = to_operand<kType>(s), ds_own = to_operand<kType>(dp);
      if constexpr (kSharesP) store_left(sP, p_own);
      store_left(sDS, ds_own);
      add_own<DOTile, kRaggedV, kBlocksV, kDv / 16>(dv, p_own, sDO);
      add_own<QTile, kRaggedK, kBlocksK, kD / 16>(dk, ds_own, sQ);
      __syncthreads();  // P^T and dS^T are written, and nobody is at the tile before this one any more
      if (kOneBarrier && more) {
        load_q(next, stage_q ^ 1);
        load_do(next, stage_do ^ 1);
        ptx::cp_async_arrive(ready + (stage_q ^ 1) * 8);
      }
      add_others<DOTile, kRaggedV, kBlocksV, kDv / 16>(dv, sP, sDO);
      if (C.stages_do == 1) {
        if (kSharesP) __syncthreads();  // nobody reads dO any more
        if (more) load_do(next, 0);
      }
      add_dq(tile, sDS);
      add_others<QTile, kRaggedK, kBlocksK, kD / 16>(dk, sDS, sQ);
      if (C.stages_q == 1) {
        if (kSharesP) __syncthreads();  // nobody reads Q any more
        if (more) load_q(next, 0);
      }
    }
  }
};

template <BwdConfig C>
__global__ __launch_bounds__(threads(C), C.blocks) void bwd_sm80(const __grid_constant__ BwdLaunch l) {
  extern __shared__ __align__(1024) unsigned char smem[];
  const BwdMain<C> block(l, smem);
  if (i64(block.n_block) * C.block_n >= max<i64>(block.seq.rows_k - block.seq.leftpad, 1)) return;
  block.run();
}

}  // namespace strobe
