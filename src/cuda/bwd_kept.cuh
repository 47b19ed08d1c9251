// Few kept tokens ahead of a window, which all queries see. In the main kernel they would cost a pass of one long block
// over all queries for a nearly empty tile. Here they ride on the pass that reads every query anyway: the tile's delta,
// then scores of 16 keys, whose dQ begins the accumulator, and their dK and dV, in parts that are summed in a fixed
// order.
#pragma once

#include "cuda/bwd_pre.cuh"
#include "cuda/bwd_scores.cuh"
#include "cuda/tile/bwd_tile.cuh"

namespace strobe {

// A warp's columns of dK or dV, from column 16 * block on, of the keys that are kept tokens.
template <int kDim, int kBlocks>
__device__ __forceinline__ void store_kept(const Fragment<16, kBlocks * 16>& x, float* parts, i64 row_stride, int block,
                                           int kept, float scale) {
  const int lane = lane_id();
#pragma unroll
  for (int n = 0; n < kBlocks * 2; ++n)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = h * 8 + lane / 4, col = block * 16 + n * 8 + lane % 4 * 2;
      if (row < kept && col < kDim)
        *reinterpret_cast<float2*>(parts + row * row_stride + col) =
            make_float2(x.x[0][n][2 * h] * scale, x.x[0][n][2 * h + 1] * scale);
    }
}

// Blocks that share a multiprocessor and hide each other's reads: as many as registers and shared memory allow.
#if __CUDA_ARCH__ == 900
constexpr int kMostKeptBlocks = 4;
#else
constexpr int kMostKeptBlocks = 2;
#endif
template <BwdKeptConfig C>
constexpr int kKeptBlocks = C.head_dim + C.head_dim_v > 256 || C.dropout ? 2 : kMostKeptBlocks;

// A block per (kept_tiles tiles of queries, head, sequence).
template <BwdKeptConfig C>
__global__ __launch_bounds__(threads(C), kKeptBlocks<C>) void bwd_kept(const __grid_constant__ BwdLaunch l) {
  static_assert(valid(C));
  constexpr DType kType = DType(C.dtype);
  constexpr int kThreads = threads(C), kM = C.block_m, kD = round_up_16(C.head_dim), kDv = round_up_16(C.head_dim_v);
  constexpr int kBlocksK = ceil_div(kD / 16, C.warps), kBlocksV = ceil_div(kDv / 16, C.warps);
  constexpr bool kRaggedK = kD / 16 % C.warps != 0, kRaggedV = kDv / 16 % C.warps != 0;
  constexpr int kAcrossQ = C.warps / C.warps_dq, kRowsQ = kM / C.warps_dq, kBlocksQ = ceil_div(kD / 16, kAcrossQ);
  constexpr bool kRaggedQ = kD / 16 % kAcrossQ != 0;
  constexpr BwdKeptSmem kSmem = bwd_kept_smem(C);
  using KTile = PaddedTile<kBwdKept, kD>;
  using VTile = PaddedTile<kBwdKept, kDv>;
  using QTile = PaddedTile<kM, kD>;
  using DOTile = PaddedTile<kM, kDv>;
  using ScoreTile = PaddedTile<kBwdKept, kM>;
  using LoadK = RowLoader<KTile, kThreads>;
  using LoadV = RowLoader<VTile, kThreads>;
  using LoadQ = RowLoader<QTile, kThreads>;
  using LoadDO = RowLoader<DOTile, kThreads>;
  extern __shared__ __align__(1024) unsigned char shared[];

  const AttnParams& p = l.p.fwd;
  const SeqInfo seq = SeqInfo::of(p, blockIdx.z);
  const i64 head = blockIdx.y;
  const u32 smem = ptx::shared_address(shared);
  float* const stats_here = reinterpret_cast<float*>(shared + kSmem.stats);
  const int warp = warp_id(), lane = lane_id();
  const int block_k = warp * kBlocksK, block_v = warp * kBlocksV;
  const int row_q = warp / kAcrossQ * kRowsQ, block_q = warp % kAcrossQ * kBlocksQ;

  const i64 hk = head / l.per_k, hv = head / l.per_v;
  const int keys = int(min<i64>(l.kept, seq.seqlen_k));
  LoadK::template load<C.head_dim>(
      smem + kSmem.k, static_cast<const u16*>(p.k.data) + seq.k_index(p.k, LoadK::row(), hk) + LoadK::chunk() * 8,
      p.k.row_stride, keys);
  LoadV::template load<C.head_dim_v>(
      smem + kSmem.v, static_cast<const u16*>(p.v.data) + seq.k_index(p.v, LoadV::row(), hv) + LoadV::chunk() * 8,
      p.v.row_stride, keys);
  if (threadIdx.x < kBwdKept) {
    const Queries q = int(threadIdx.x) < keys ? mask_of(p, seq).queries(threadIdx.x) : Queries{0, 0, 0, 0};
    ptx::st_shared_16(smem + kSmem.seen + threadIdx.x * 16, seen_of(q));
  }

  Fragment<kBwdKept, kBlocksK * 16> dk;
  Fragment<kBwdKept, kBlocksV * 16> dv;
  dk.clear();
  dv.clear();
#pragma unroll 1
  for (int t = 0; t < l.kept_tiles; ++t) {
    const i64 tile = i64(blockIdx.x) * l.kept_tiles + t, row0 = tile * kM;
    if (tile >= l.max_q_tiles) break;
    const bool any = row0 < seq.rows_q;
    if (any) {
      __syncthreads();  // nobody reads the tile before any more
      const int rows = int(min<i64>(kM, max<i64>(0, seq.seqlen_q - row0)));
      LoadQ::template load<C.head_dim>(
          smem + kSmem.q,
          static_cast<const u16*>(p.q.data) + seq.q_index(p.q, row0 + LoadQ::row(), head) + LoadQ::chunk() * 8,
          p.q.row_stride, rows);
      LoadDO::template load<C.head_dim_v>(smem + kSmem.dout,
                                          static_cast<const u16*>(l.p.dout.data) +
                                              seq.q_index(l.p.dout, row0 + LoadDO::row(), head) + LoadDO::chunk() * 8,
                                          l.p.dout.row_stride, rows);
    }
    const i64 at = head * l.q_tiles + l.first_q_tile(seq, kM) + tile;
    float* const stats = l.stats + at * 2 * kM;
    prepare_tile<kType, kThreads, kM, C.head_dim_v>(l, seq, head, tile, [&](int r, float shift, float delta) {
      stats[r] = stats_here[r] = shift;
      stats[kM + r] = stats_here[kM + r] = delta;
    });
    if (!any) continue;
    ptx::cp_async_wait_all();
    __syncthreads();  // the tile, its stats and the keys are there

    if (warp < kM / 16) {
      Fragment<kBwdKept, 16> s, dp;
      s.clear();
      dp.clear();
      gemm<kType, KTile, false, QTile, false, kD, false>(s, lane_address<KTile>(smem + kSmem.k, 0, 0),
                                                         lane_address_swapped<QTile>(smem + kSmem.q, warp * 16, 0), 0);
      gemm<kType, VTile, false, DOTile, false, kDv, false>(
          dp, lane_address<VTile>(smem + kSmem.v, 0, 0), lane_address_swapped<DOTile>(smem + kSmem.dout, warp * 16, 0),
          0);
      const BwdScores<C> scores = {
          p, seq, i32(head), i32(row0) + warp * 16, 0, smem + kSmem.stats + u32(warp * 16 * 4), smem + kSmem.seen};
      typename BwdScores<C>::template Kept<kBwdKept, 16> drawn;
      if constexpr (C.dropout) drawn = scores.template draw<kBwdKept, 16>();
      scores.template apply<true>(s, dp, drawn);
      const Operand<kBwdKept, 16> left[2] = {to_operand<kType>(s), to_operand<kType>(dp)};
      const u32 to = u32(lane / 4 * ScoreTile::kStride + (warp * 16 + lane % 4 * 2) * 2);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const u32 place = to + u32(e % 2 * 8 * ScoreTile::kStride + e / 2 * 8 * 2);
        ptx::st_shared_4(smem + kSmem.p + place, left[0].x[0][0][e]);
        ptx::st_shared_4(smem + kSmem.ds + place, left[1].x[0][0][e]);
      }
    }
    __syncthreads();  // P^T and dS^T are written

    gemm<kType, ScoreTile, false, DOTile, true, kM, kRaggedV>(dv, lane_address<ScoreTile>(smem + kSmem.p, 0, 0),
                                                              lane_address<DOTile>(smem + kSmem.dout, 0, block_v * 16),
                                                              kDv / 16 - block_v);
    gemm<kType, ScoreTile, false, QTile, true, kM, kRaggedK>(dk, lane_address<ScoreTile>(smem + kSmem.ds, 0, 0),
                                                             lane_address<QTile>(smem + kSmem.q, 0, block_k * 16),
                                                             kD / 16 - block_k);
    Fragment<kRowsQ, kBlocksQ * 16> dq;
    dq.clear();
    gemm<kType, ScoreTile, true, KTile, true, kBwdKept, kRaggedQ>(
        dq, lane_address_swapped<ScoreTile>(smem + kSmem.ds, 0, row_q),
        lane_address<KTile>(smem + kSmem.k, 0, block_q * 16), kD / 16 - block_q);
    float* const acc = l.dq_acc + at * l.dq_tile + warp * (kRowsQ * kBlocksQ * 16) + dq_lane();
#pragma unroll
    for (int piece = 0; piece < kRowsQ / 16 * kBlocksQ * 2; ++piece) {
      const float (&x)[4] = dq.x[piece / (kBlocksQ * 2)][piece % (kBlocksQ * 2)];
      if constexpr (kAddsVectors) {
        *reinterpret_cast<float4*>(acc + dq_slot(piece, 0)) = make_float4(x[0], x[1], x[2], x[3]);
      } else {
#pragma unroll
        for (int e = 0; e < 4; ++e) acc[dq_slot(piece, e)] = x[e];
      }
    }
  }

  float* const parts = l.kept_parts + ((head * p.batch + seq.batch) * l.kept_chunks() + blockIdx.x) * l.kept *
                                          (C.head_dim + C.head_dim_v);
  constexpr int kStride = C.head_dim + C.head_dim_v;
  store_kept<C.head_dim, kBlocksK>(dk, parts, kStride, block_k, l.kept, p.scale);
  store_kept<C.head_dim_v, kBlocksV>(dv, parts + C.head_dim, kStride, block_v, l.kept, 1.f);
}

// A block per (kept token, head of dk or, behind those, of dv, sequence), after all others that write dk and dv. Groups
// of threads sum every so manieth chunk of queries, then the first one their sums.
template <BwdSumConfig C>
__global__ __launch_bounds__(threads(C), 2) void bwd_kept_sum(const __grid_constant__ BwdLaunch l) {
  constexpr int kThreads = threads(C);
  __shared__ float4 sums[kThreads];
  const AttnParams& p = l.p.fwd;
  const SeqInfo seq = SeqInfo::of(p, blockIdx.z);
  const i64 j = blockIdx.x;
  if (j >= seq.rows_k - seq.leftpad) return;
  const bool is_v = i64(blockIdx.y) >= p.num_heads_k;
  const i64 head = i64(blockIdx.y) - (is_v ? p.num_heads_k : 0), heads = is_v ? l.per_v : l.per_k;
  const int lanes = int(is_v ? p.head_dim_v : p.head_dim) / 4, groups = kThreads / lanes;
  const int lane = int(threadIdx.x) % lanes, group = int(threadIdx.x) / lanes;
  const i64 width = p.head_dim + p.head_dim_v, chunks = l.kept_chunks();
  if (group < groups) {
    const float* from = l.kept_parts + j * width + (is_v ? p.head_dim : 0) + lane * 4;
    float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
    const i64 per_head = p.batch * chunks * l.kept * width;
    for (i64 chunk = group; chunk < chunks; chunk += groups) {
      const float* part = from + head * heads * per_head + (seq.batch * chunks + chunk) * l.kept * width;
#pragma unroll 8
      for (i64 h = 0; h < heads; ++h, part += per_head) {
        const float4 x = *reinterpret_cast<const float4*>(part);
        sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
      }
    }
    sums[threadIdx.x] = sum;
  }
  __syncthreads();  // every group's sum is there
  if (group != 0) return;
  float4 sum = sums[lane];
  for (int g = 1; g < groups; ++g) {
    const float4 x = sums[g * lanes + lane];
    sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
  }
  const Rows& out = is_v ? l.p.dv : l.p.dk;
  u16* to = static_cast<u16*>(out.data) + seq.k_index(out, j, head) + lane * 4;
  constexpr DType kType = DType(C.dtype);
  *reinterpret_cast<uint2*>(to) = make_uint2(ptx::cvt_pair<kType>(sum.x, sum.y), ptx::cvt_pair<kType>(sum.z, sum.w));
}

}  // namespace strobe
