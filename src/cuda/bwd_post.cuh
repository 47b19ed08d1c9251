// What follows the backward pass: the dQ accumulator becomes dq, partial dK and dV of blocks that share a key head are
// summed, and so are the parts of the sink's gradient; all in a fixed order.
#pragma once

#include "core/launch_bwd.h"
#include "cuda/tile/bwd_tile.cuh"

namespace strobe {

// The sum of a head's parts, by the first warp.
__device__ __forceinline__ void sum_sinks(const BwdLaunch& l, i64 head) {
  const i64 parts = l.p.fwd.batch * l.max_q_tiles;
  if (threadIdx.x >= 32) return;
  float sum = 0.f;
  for (i64 i = threadIdx.x; i < parts; i += 32) sum += l.sinks[head * parts + i];
#pragma unroll
  for (int x = 1; x < 32; x *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, x);
  if (threadIdx.x == 0) l.p.ds_aux[head] = sum;
}

// A block per (tile of queries, head, sequence). Its warps hold what those of the main kernel held.
template <BwdPostConfig C>
__global__ __launch_bounds__(threads(C)) void bwd_post(const __grid_constant__ BwdLaunch l) {
  static_assert(valid(C));
  constexpr DType kType = DType(C.dtype);
  constexpr int kThreads = threads(C), kM = C.block_m, kD = round_up_16(C.head_dim);
  constexpr int kAcross = C.warps / C.warps_dq, kRows = kM / C.warps_dq, kBlocks = ceil_div(kD / 16, kAcross);
  using Tile = PaddedTile<kM, kD>;
  extern __shared__ __align__(1024) unsigned char smem[];

  const AttnParams& p = l.p.fwd;
  const SeqInfo seq = SeqInfo::of(p, blockIdx.z);
  const i64 tile = blockIdx.x, head = blockIdx.y, row0 = tile * kM;
  if (l.sinks && tile == 0 && blockIdx.z == 0) sum_sinks(l, head);
  if (row0 >= seq.rows_q) return;
  const int warp = warp_id(), lane = lane_id();
  const int row = warp / kAcross * kRows, block = warp % kAcross * kBlocks;
  const float* acc = l.dq_acc + (head * l.q_tiles + l.first_q_tile(seq, kM) + tile) * l.dq_tile +
                     warp * (kRows * kBlocks * 16) + dq_lane();
  const u32 base = ptx::shared_address(smem);
#pragma unroll
  for (int m = 0; m < kRows / 16; ++m)
#pragma unroll
    for (int n = 0; n < kBlocks * 2; ++n) {
      if (block + n / 2 >= kD / 16) break;
      const int piece = m * kBlocks * 2 + n;
      float x[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) x[e] = acc[dq_slot(piece, e)] * p.scale;
#pragma unroll
      for (int h = 0; h < 2; ++h)
        ptx::st_shared_4(
            base + u32((row + m * 16 + h * 8 + lane / 4) * Tile::kStride + (block * 16 + n * 8 + lane % 4 * 2) * 2),
            ptx::cvt_pair<kType>(x[2 * h], x[2 * h + 1]));
    }
  __syncthreads();  // the tile is complete
  constexpr int kChunks = C.head_dim / 8;
  u16* dq = static_cast<u16*>(l.p.dq.data);
  for (int at = int(threadIdx.x); at < kM * kChunks; at += kThreads) {
    const i64 i = row0 + at / kChunks;
    if (i >= seq.rows_q) break;
    uint4 x = ptx::ld_shared_16(base + u32(at / kChunks * Tile::kStride + at % kChunks * 16));
    if (i >= seq.seqlen_q) x = make_uint4(0, 0, 0, 0);
    *reinterpret_cast<uint4*>(dq + seq.q_index(l.p.dq, i, head) + at % kChunks * 8) = x;
  }
}

// A thread per 8 columns of a row: blocks per (part of a block of keys, head of dk or dv, sequence), those of no keys
// included: they clear padding on the left.
template <BwdSumConfig C>
__global__ __launch_bounds__(threads(C), 4) void bwd_sum(const __grid_constant__ BwdSumLaunch l) {
  constexpr DType kType = DType(C.dtype);
  const SeqInfo seq = SeqInfo::of(l.p, blockIdx.z);
  const u32 chunks = u32(l.dim / 8), blocks = u32(bwd_sum_blocks(l.block_n, l.dim, threads(C)));
  const i64 n = blockIdx.x / blocks + l.first, head = blockIdx.y, size = l.k_tiles * l.block_n * l.dim;
  u16* out = static_cast<u16*>(l.out.data);
  const u32 at = blockIdx.x % blocks * u32(threads(C)) + threadIdx.x;
  const i64 r = at / chunks, c = at % chunks * 8, j = n * l.block_n + r;
  if (r < l.block_n && j < seq.rows_k - seq.leftpad) {
    const i64 tile = bwd_first_k_tile(l.p, seq, l.max_k_tiles - l.first, l.block_n) + n - l.first;
    const float* part = l.parts + head * l.count * size + (tile * l.block_n + r) * l.dim + c;
    float sum[8] = {};
#pragma unroll 4
    for (i64 s = 0; s < l.count; ++s, part += size) {
      const float4 low = *reinterpret_cast<const float4*>(part), high = *reinterpret_cast<const float4*>(part + 4);
      sum[0] += low.x, sum[1] += low.y, sum[2] += low.z, sum[3] += low.w;
      sum[4] += high.x, sum[5] += high.y, sum[6] += high.z, sum[7] += high.w;
    }
    *reinterpret_cast<uint4*>(out + seq.k_index(l.out, j, head) + c) =
        make_uint4(ptx::cvt_pair<kType>(sum[0], sum[1]), ptx::cvt_pair<kType>(sum[2], sum[3]),
                   ptx::cvt_pair<kType>(sum[4], sum[5]), ptx::cvt_pair<kType>(sum[6], sum[7]));
  }
  if (blockIdx.x != 0 || l.first != 0) return;
  for (i64 at = threadIdx.x; at < min(seq.leftpad, seq.rows_k) * chunks; at += threads(C))
    *reinterpret_cast<uint4*>(out + seq.k_index(l.out, at / chunks - seq.leftpad, head) + at % chunks * 8) =
        make_uint4(0, 0, 0, 0);
}

}  // namespace strobe
