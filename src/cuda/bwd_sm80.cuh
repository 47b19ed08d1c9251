// The backward pass but for its ends: dK and dV of a block of keys in registers, dQ added up in memory.
//
//   P = exp(score - LSE)    dV = P^T dO    dS = P * (dO V^T - delta)    dK = dS^T Q    dQ = dS K
//
// A block takes the keys of one K/V head pair and, one after another, the query heads that read both; tiles of queries
// come backwards. Scores are computed transposed (rows are keys), so that P^T and dS^T are what dV and dK multiply from
// the left: a warp's own queries from registers, those of its neighbours through shared memory. Loads and additions to
// memory are strewn among the products, whose operands would wait behind them in the same queue.
#pragma once

#include "core/launch_bwd.h"
#include "core/philox.h"
#include "cuda/bwd_scores.cuh"
#include "cuda/ptx/memory.cuh"
#include "cuda/tile/bwd_tile.cuh"

namespace strobe {

template <BwdConfig C>
struct BwdMain {
  static_assert(valid(C));
  static constexpr DType kType = DType(C.dtype);
  static constexpr int kThreads = threads(C), kM = C.block_m, kN = C.block_n;
  static constexpr int kD = round_up_16(C.head_dim), kDv = round_up_16(C.head_dim_v);
  static constexpr bool kSharesP = bwd_shares_p(C);
  static constexpr BwdSmem kSmem = bwd_smem(C);

  // A warp's part of each product: rows, columns or 16-column blocks, whether the last warp has fewer.
  static constexpr int kAcross = C.warps / C.warps_n, kAcrossQ = C.warps / C.warps_dq;
  static constexpr int kRows = kN / C.warps_n, kCols = kM / kAcross;
  static constexpr int kBlocksK = ceil_div(kD / 16, kAcross), kBlocksV = ceil_div(kDv / 16, kAcross);
  static constexpr bool kRaggedK = kD / 16 % kAcross != 0, kRaggedV = kDv / 16 % kAcross != 0;
  static constexpr int kRowsQ = kM / C.warps_dq, kBlocksQ = ceil_div(kD / 16, kAcrossQ);
  static constexpr bool kRaggedQ = kD / 16 % kAcrossQ != 0;
  // Whether dQ comes before dV is complete: more products to strew its additions among, but more registers.
  static constexpr bool kEarlyDQ = kAcross <= 2 || kRowsQ * kBlocksQ <= 64;

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

  // A thread block's block of keys, its query heads and its sequence.
  struct Place {
    u32 n_block, head0, batch, heads;

    __device__ __forceinline__ static Place of(const BwdLaunch& l) {
      const u32 num_heads = u32(l.p.fwd.num_heads), before = u32(l.first_blocks);
      u32 i = blockIdx.x;
      const u32 firsts = before * (num_heads / u32(l.first_heads)) * u32(l.p.fwd.batch);
      const bool first = i < firsts;
      if (!first) i -= firsts;
      const u32 heads = first ? u32(l.first_heads) : u32(l.heads_per_block), groups = num_heads / heads;
      const u32 blocks = first ? before : u32(l.max_k_tiles) - before, rest = i / blocks;
      return {i % blocks + (first ? 0 : before), rest % groups * heads, rest / groups, heads};
    }
  };

  // A tile of queries: its number, its place in stats and dq_acc. The rest follows from these: registers are what
  // this kernel has least of.
  struct Tile {
    i32 m, at;
  };

  // In shared memory. The walk is that of the block's keys.
  struct State {
    SeqInfo seq;
    Mask mask;
    i64 first_q_tile;
    i32 n_block, head0, heads;  // the block of keys, the first query head and how many
    i32 seqlen_q;
    i32 begin[2], count[2], full_begin[2], full_end[2];
  };
  static_assert(sizeof(State) <= kBwdStateBytes);

  const BwdLaunch& l;
  const BackwardParams& b;
  const AttnParams& p;
  State& state;
  const SeqInfo& seq;
  const u32 smem;
  const int warp = warp_id(), lane = lane_id();

  __device__ __forceinline__ BwdMain(const BwdLaunch& launch, unsigned char* shared)
      : l(launch),
        b(launch.p),
        p(launch.p.fwd),
        state(*reinterpret_cast<State*>(shared + kSmem.state)),
        seq(state.seq),
        smem(ptx::shared_address(shared)) {
    if (threadIdx.x == 0) {
      State& s = state;
      const Place place = Place::of(l);
      s.n_block = i32(place.n_block);
      s.head0 = i32(place.head0);
      s.heads = i32(place.heads);
      s.seq = SeqInfo::of(p, place.batch);
      s.mask = l.main_mask(s.seq);
      s.seqlen_q = i32(s.seq.seqlen_q);
      s.first_q_tile = l.first_q_tile(s.seq, kM);
      const Walk walk = s.mask.visit_queries(i64(s.n_block) * kN, i64(s.n_block) * kN + kN, kM);
      for (int r = 0; r < 2; ++r) {
        s.begin[r] = i32(walk.run[r].begin);
        s.count[r] = i32(walk.run[r].end - walk.run[r].begin);
        s.full_begin[r] = i32(walk.run[r].full_begin);
        s.full_end[r] = i32(walk.run[r].full_end);
        if (s.n_block == 0 && l.kept > 0) s.full_begin[r] = s.full_end[r] = s.begin[r];  // see store_seen()
      }
    }
    __syncthreads();  // the state is written
  }

  __device__ __forceinline__ i32 run_of(const Tile& tile) const {
    return state.count[1] > 0 && tile.m >= state.begin[1];
  }
  // Whether the tile holds a masked pair.
  __device__ __forceinline__ bool is_masked(const Tile& tile) const {
    const i32 run = run_of(tile);
    return tile.m < state.full_begin[run] || tile.m >= state.full_end[run];
  }
  // Among those of the block.
  __device__ __forceinline__ i32 head_of(const Tile& tile) const {
    return (tile.at - tile.m - i32(state.first_q_tile)) / i32(l.q_tiles) - state.head0;
  }

  // What comes next from memory: tiles backwards, for each head. Pointers are this thread's.
  struct Prefetch {
    Tile tile;
    i32 rows;  // queries from the tile's first on
    const u16 *q, *dout;
  };

  __device__ __forceinline__ void seek(Prefetch& f, i32 head, i32 run) const {
    f.tile.m = state.begin[run] + state.count[run] - 1;
    f.tile.at = i32((state.head0 + head) * l.q_tiles + state.first_q_tile) + f.tile.m;
    const i64 row = i64(f.tile.m) * kM;
    f.q = static_cast<const u16*>(p.q.data) + seq.q_index(p.q, row + LoadQ::row(), state.head0 + head) +
          LoadQ::chunk() * 8;
    f.dout = static_cast<const u16*>(b.dout.data) + seq.q_index(b.dout, row + LoadDO::row(), state.head0 + head) +
             LoadDO::chunk() * 8;
    f.rows = state.seqlen_q - f.tile.m * kM;
  }
  __device__ __forceinline__ void advance(Prefetch& f) const {
    const i32 run = run_of(f.tile);
    if (f.tile.m > state.begin[run]) {
      --f.tile.m;
      --f.tile.at;
      f.q -= kM * p.q.row_stride;
      f.dout -= kM * b.dout.row_stride;
      f.rows = state.seqlen_q - f.tile.m * kM;
    } else if (run == 1 && state.count[0] > 0) {
      seek(f, head_of(f.tile), 0);
    } else {
      seek(f, head_of(f.tile) + 1, state.count[1] > 0);
    }
  }

  __device__ __forceinline__ void load_keys() const {
    using LoadK = RowLoader<KTile, kThreads>;
    using LoadV = RowLoader<VTile, kThreads>;
    const i64 row = i64(state.n_block) * kN;
    const int rows = int(min<i64>(kN, max<i64>(0, seq.seqlen_k - row)));
    const i64 hk = state.head0 / l.per_k, hv = state.head0 / l.per_v;
    const u16 *k = static_cast<const u16*>(p.k.data), *v = static_cast<const u16*>(p.v.data);
    LoadK::template load<C.head_dim>(smem + kSmem.k, k + seq.k_index(p.k, row + LoadK::row(), hk) + LoadK::chunk() * 8,
                                     p.k.row_stride, rows);
    LoadV::template load<C.head_dim_v>(
        smem + kSmem.v, v + seq.k_index(p.v, row + LoadV::row(), hv) + LoadV::chunk() * 8, p.v.row_stride, rows);
  }
  // Part `step` of `steps` of a tile of Q with its LSE and delta, and of one of dO.
  __device__ __forceinline__ void load_q(const Prefetch& f, int stage, int step, int steps) const {
#pragma unroll
    for (int i = step * LoadQ::kPieces / steps; i < (step + 1) * LoadQ::kPieces / steps; ++i)
      LoadQ::template load_piece<C.head_dim>(i, smem + kSmem.q + stage * QTile::kBytes, f.q, p.q.row_stride, f.rows);
    if (step > 0) return;
    const float* stats = l.stats + i64(f.tile.at) * (2 * kM);
    for (int i = int(threadIdx.x); i < kM / 2; i += kThreads)
      ptx::cp_async_16(smem + kSmem.stats + u32((stage * kM / 2 + i) * 16), stats + i * 4);
  }
  __device__ __forceinline__ void load_do(const Prefetch& f, int stage, int step, int steps) const {
#pragma unroll
    for (int i = step * LoadDO::kPieces / steps; i < (step + 1) * LoadDO::kPieces / steps; ++i)
      LoadDO::template load_piece<C.head_dim_v>(i, smem + kSmem.dout + stage * DOTile::kBytes, f.dout,
                                                b.dout.row_stride, f.rows);
  }

  // The queries that see each key, for tiles with a masked pair.
  __device__ __forceinline__ void store_seen() const {
    for (int j = int(threadIdx.x); j < kN; j += kThreads) {
      ptx::st_shared_16(smem + kSmem.seen + j * 16, seen_of(state.mask.queries(i64(state.n_block) * kN + j)));
      // Keys of bwd_kept: nobody sees them here.
      if (state.n_block == 0 && j < l.kept) ptx::st_shared_16(smem + kSmem.seen + j * 16, seen_of({0, 0, 0, 0}));
    }
  }

  // This warp's rows and columns of S^T.
  __device__ __forceinline__ int row() const { return warp / kAcross * kRows; }
  __device__ __forceinline__ int col() const { return warp % kAcross * kCols; }

  // between(step, steps) runs after each of that many steps.
  template <class Between>
  __device__ __forceinline__ Scores make_s(int stage, Between between) const {
    Scores s;
    s.clear();
    constexpr int kSteps = kD / 16 * (kCols / 16);
    gemm<kType, KTile, false, QTile, false, kD, false>(
        s, lane_address<KTile>(smem + kSmem.k, row(), 0),
        lane_address_swapped<QTile>(smem + kSmem.q + stage * QTile::kBytes, col(), 0), 0,
        [&](int step) { between(step, kSteps); });
    return s;
  }
  template <class Between>
  __device__ __forceinline__ Scores make_dp(int stage, Between between) const {
    Scores dp;
    dp.clear();
    constexpr int kSteps = kDv / 16 * (kCols / 16);
    gemm<kType, VTile, false, DOTile, false, kDv, false>(
        dp, lane_address<VTile>(smem + kSmem.v, row(), 0),
        lane_address_swapped<DOTile>(smem + kSmem.dout + stage * DOTile::kBytes, col(), 0), 0,
        [&](int step) { between(step, kSteps); });
    return dp;
  }

  __device__ __forceinline__ BwdScores<C> scores_of(const Tile& tile, int stage) const {
    return {p,
            seq,
            C.alibi || C.dropout ? state.head0 + head_of(tile) : 0,
            tile.m * kM + col(),
            state.n_block * kN + row(),
            smem + kSmem.stats + u32(stage * 2 * kM + col()) * 4,
            smem + kSmem.seen + u32(row() * 16)};
  }
  using Kept = typename BwdScores<C>::template Kept<kRows, kCols>;

  // S^T and dP^T become P^T and dS^T (without the scale of the scores).
  __device__ __forceinline__ void apply_scores(const Tile& tile, bool masked, int stage, Scores& s, Scores& dp,
                                               const Kept& kept) const {
    const BwdScores<C> f = scores_of(tile, stage);
    if (masked)
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
  // between(step, steps) runs after each of that many steps.
  template <class TileB, bool kRagged, int kBlocks, int kAll, class Between>
  __device__ __forceinline__ void add_others(Gradient<kBlocks>& x, u32 left, u32 right, Between between) const {
    const int block = warp % kAcross * kBlocks;
    constexpr int kSteps = kCols / 16 * kBlocks;
#pragma unroll
    for (int o = 1; o < kAcross; ++o) {
      const int from = (warp + o) % kAcross * kCols;
      gemm<kType, ScoreTile, false, TileB, true, kCols, kRagged>(
          x, lane_address<ScoreTile>(left, row(), from), lane_address<TileB>(right, from, block * 16), kAll - block,
          [&](int step) { between((o - 1) * kSteps + step, (kAcross - 1) * kSteps); });
    }
  }

  using DQ = Fragment<kRowsQ, kBlocksQ * 16>;
  static constexpr int kPiecesQ = kRowsQ / 16 * kBlocksQ * 2;  // of 8 columns

  __device__ __forceinline__ int blocks_dq() const { return kD / 16 - warp % kAcrossQ * kBlocksQ; }

  // dQ = dS K of a tile.
  __device__ __forceinline__ DQ make_dq(u32 ds) const {
    const int row = warp / kAcrossQ * kRowsQ, block = warp % kAcrossQ * kBlocksQ;
    DQ dq;
    dq.clear();
    gemm<kType, ScoreTile, true, KTile, true, kN, kRaggedQ>(dq, lane_address_swapped<ScoreTile>(ds, 0, row),
                                                            lane_address<KTile>(smem + kSmem.k, 0, block * 16),
                                                            blocks_dq());
    return dq;
  }
  // This lane's part of the accumulator.
  __device__ __forceinline__ float* dq_acc(const Tile& tile) const {
    return l.dq_acc + tile.at * l.dq_tile + warp * (kRowsQ * kBlocksQ * 16) + dq_lane();
  }
  __device__ __forceinline__ void add_piece(float* acc, const DQ& dq, int piece) const {
    if (kRaggedQ && piece % (kBlocksQ * 2) / 2 >= blocks_dq()) return;
    const float (&x)[4] = dq.x[piece / (kBlocksQ * 2)][piece % (kBlocksQ * 2)];
#if __CUDA_ARCH__ >= 900
    ptx::red_add_v4(acc + dq_slot(piece, 0), x);
#else
#pragma unroll
    for (int e = 0; e < 4; ++e) ptx::red_add(acc + dq_slot(piece, e), x[e]);
#endif
  }
  // Additions in an order that is always the same: each warp waits for those of other blocks that add to the same part
  // of the tile. Those blocks have lower numbers and were started earlier.
  __device__ __forceinline__ void take_turn(const Tile& tile) const {
    while (ptx::ld_acquire(turns(tile) + warp) != u32(state.n_block)) __nanosleep(20);
    __syncwarp();
  }
  __device__ __forceinline__ void pass_turn(const Tile& tile) const {
    __threadfence();
    __syncwarp();
    const BwdTurns order = {turns(tile)[C.warps], turns(tile)[C.warps + 1]};
    if (lane == 0) ptx::st_release(turns(tile) + warp, order.after(u32(state.n_block)));
  }
  __device__ __forceinline__ u32* turns(const Tile& tile) const { return l.turns + i64(tile.at) * (C.warps + 2); }

  // A block's rows of dk or dv, or its part of them. `tile` is shared memory that nobody reads any more: rows leave 16
  // bytes at a time.
  template <class OutTile, int kDim, bool kRagged, int kBlocks>
  __device__ __forceinline__ void write(const Gradient<kBlocks>& x, u32 tile, float scale, const Rows& out, i32 head,
                                        float* parts) const {
    const int row0 = row(), block = warp % kAcross * kBlocks;
    const i64 rows = seq.rows_k - seq.leftpad - i64(state.n_block) * kN;
    if (parts) {
      const i32 first = l.first_part();
      parts += ((state.head0 / l.heads_per_block) * l.k_tiles + bwd_first_k_tile(p, seq, l.max_k_tiles - first, kN) +
                state.n_block - first) *
               i64(kN * kDim);
#pragma unroll
      for (int r = 0; r < kRows / 8; ++r)
#pragma unroll
        for (int n = 0; n < kBlocks * 2; ++n) {
          const int at = row0 + r * 8 + lane / 4, col = block * 16 + n * 8 + lane % 4 * 2;
          if (at >= rows || col >= kDim) continue;
          *reinterpret_cast<float2*>(parts + at * kDim + col) =
              make_float2(x.x[r / 2][n][r % 2 * 2] * scale, x.x[r / 2][n][r % 2 * 2 + 1] * scale);
        }
      return;
    }
    const u32 to = tile + u32((row0 + lane / 4) * OutTile::kStride + (block * 16 + lane % 4 * 2) * 2);
#pragma unroll
    for (int r = 0; r < kRows / 8; ++r)
#pragma unroll
      for (int n = 0; n < kBlocks * 2; ++n) {
        if (kRagged && block + n / 2 >= OutTile::kCols / 16) continue;
        ptx::st_shared_4(to + u32(r * 8 * OutTile::kStride + n * 16),
                         ptx::cvt_pair<kType>(x.x[r / 2][n][r % 2 * 2] * scale, x.x[r / 2][n][r % 2 * 2 + 1] * scale));
      }
    __syncwarp();
    constexpr int kChunks = kBlocks * 2;
    u16* rows_out = static_cast<u16*>(out.data) + seq.k_index(out, i64(state.n_block) * kN, head);
#pragma unroll 4
    for (int i = lane; i < kRows * kChunks; i += 32) {
      const int at = row0 + i / kChunks, col = block * 16 + i % kChunks * 8;
      if (at < rows && col < kDim)
        *reinterpret_cast<uint4*>(rows_out + at * out.row_stride + col) =
            ptx::ld_shared_16(tile + u32(at * OutTile::kStride + col * 2));
    }
  }

  // Padding on the left has no gradient.
  template <int kDim>
  __device__ __forceinline__ void clear_leftpad(const Rows& out, i32 head) const {
    for (i64 at = threadIdx.x; at < min(seq.leftpad, seq.rows_k) * (kDim / 8); at += kThreads) {
      const i64 j = at / (kDim / 8) - seq.leftpad;
      u16* to = static_cast<u16*>(out.data) + seq.k_index(out, j, head) + at % (kDim / 8) * 8;
      *reinterpret_cast<uint4*>(to) = make_uint4(0, 0, 0, 0);
    }
  }

  __device__ __forceinline__ void run() const {
    Gradient<kBlocksK> dk;
    Gradient<kBlocksV> dv;
    dk.clear();
    dv.clear();
    const i32 total = (state.count[0] + state.count[1]) * state.heads;
    if (total > 0) loop(total, dk, dv);
    __syncthreads();  // nobody reads shared memory any more
    const i32 hk = state.head0 / l.per_k, hv = state.head0 / l.per_v;
    float* const dk_parts = state.heads < l.per_k ? l.dk_parts : nullptr;  // where others share the head
    float* const dv_parts = state.heads < l.per_v ? l.dv_parts : nullptr;
    write<KTile, C.head_dim, kRaggedK, kBlocksK>(dk, smem + kSmem.k, p.scale, b.dk, hk, dk_parts);
    write<VTile, C.head_dim_v, kRaggedV, kBlocksV>(dv, smem + kSmem.v, 1.f, b.dv, hv, dv_parts);
    if (seq.leftpad > 0 && state.n_block == 0) {
      if (!dk_parts) clear_leftpad<C.head_dim>(b.dk, hk);
      if (!dv_parts) clear_leftpad<C.head_dim_v>(b.dv, hv);
    }
  }

  __device__ __forceinline__ void loop(i32 total, Gradient<kBlocksK>& dk, Gradient<kBlocksV>& dv) const {
    constexpr auto nothing = [](int, int) {};
    Prefetch next;
    seek(next, 0, state.count[1] > 0);
    load_keys();
    load_q(next, 0, 0, 1);
    load_do(next, 0, 0, 1);
    store_seen();
#pragma unroll 1
    for (i32 it = 0; it < total; ++it) {
      const int stage_q = C.stages_q == 2 ? it % 2 : 0, stage_do = C.stages_do == 2 ? it % 2 : 0;
      const u32 sQ = smem + kSmem.q + stage_q * QTile::kBytes, sDO = smem + kSmem.dout + stage_do * DOTile::kBytes;
      const u32 sP = smem + kSmem.p, sDS = smem + kSmem.ds;
      const bool more = it + 1 < total;
      const Tile tile = next.tile;
      if (more)
        advance(next);
      else
        next.rows = 0;  // what is loaded next is zeros that nobody reads: no branches among the products
      ptx::cp_async_wait_all();
      __syncthreads();  // the tile is there, and nobody reads the one before it any more

      Kept kept;
      if constexpr (C.dropout) kept = scores_of(tile, stage_q).template draw<kRows, kCols>();
      Scores s = make_s(stage_q, [&](int step, int steps) {
        if (C.stages_q == 2) load_q(next, stage_q ^ 1, step, steps);
      });
      const bool masked = is_masked(tile);
      Scores dp = make_dp(stage_do, [&](int step, int steps) {
        if (C.stages_do == 2) load_do(next, stage_do ^ 1, step, steps);
      });
      apply_scores(tile, masked, stage_q, s, dp, kept);
      const Left p_own = to_operand<kType>(s), ds_own = to_operand<kType>(dp);
      if constexpr (kSharesP) store_left(sP, p_own);
      store_left(sDS, ds_own);
      add_own<DOTile, kRaggedV, kBlocksV, kDv / 16>(dv, p_own, sDO);
      add_own<QTile, kRaggedK, kBlocksK, kD / 16>(dk, ds_own, sQ);
      __syncthreads();  // P^T and dS^T are written, and all that was read before them is read

      const auto rest_of_dv = [&](auto between) {
        add_others<DOTile, kRaggedV, kBlocksV, kDv / 16>(dv, sP, sDO, between);
      };
      const auto rest_of_dk = [&](auto between) {
        add_others<QTile, kRaggedK, kBlocksK, kD / 16>(dk, sDS, sQ, between);
      };
      if constexpr (!kEarlyDQ) rest_of_dv(nothing);
      const DQ dq = make_dq(sDS);
      // Pieces first .. last - 1, as many after each step.
      const auto adding = [&](int first, int last) {
        return [&dq, this, first, last, acc = dq_acc(tile)](int step, int steps) {
          const int count = last - first;
#pragma unroll
          for (int i = step * count / steps; i < (step + 1) * count / steps; ++i) add_piece(acc, dq, first + i);
        };
      };
      constexpr int kHalf = kEarlyDQ ? kPiecesQ / 2 : 0;
      if constexpr (C.deterministic || kAcross == 1) {  // whose turn it is does not hold the next one up for long
        if (C.deterministic) take_turn(tile);
        adding(0, kPiecesQ)(0, 1);
        if (kEarlyDQ) rest_of_dv(nothing);
        if (C.deterministic) pass_turn(tile);
        rest_of_dk(nothing);
      } else {
        if (kEarlyDQ) rest_of_dv(adding(0, kHalf));
        rest_of_dk(adding(kHalf, kPiecesQ));
      }
      if ((C.stages_q == 1 || C.stages_do == 1) && more) {
        if (kSharesP) __syncthreads();  // nobody reads Q and dO any more
        if (C.stages_q == 1) load_q(next, 0, 0, 1);
        if (C.stages_do == 1) load_do(next, 0, 0, 1);
      }
    }
  }
};

template <BwdConfig C>
__global__ __launch_bounds__(threads(C), C.blocks) void bwd_sm80(const __grid_constant__ BwdLaunch l) {
  extern __shared__ __align__(1024) unsigned char smem[];
  const BwdMain<C> block(l, smem);
  if (i64(block.state.n_block) * C.block_n >= max<i64>(block.seq.rows_k - block.seq.leftpad, 1)) return;
  block.run();
}

}  // namespace strobe
