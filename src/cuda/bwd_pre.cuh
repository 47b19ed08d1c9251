// Ahead of the backward pass, per query: delta = rowsum(dO * O) - dlse and LSE in units of log2; the tile's part of the
// sink's gradient, - sum exp(sink - LSE) * delta; and the tile's dQ accumulator, cleared.
#pragma once

#include "core/launch_bwd.h"
#include "core/softmax.h"
#include "cuda/ptx/mma.cuh"

namespace strobe {

// Sums of products of eight 16-bit elements.
template <DType kType>
__device__ __forceinline__ float dot_8(const uint4& a, const uint4& b, float sum) {
  const u32 x[4] = {a.x, a.y, a.z, a.w}, y[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    sum = fmaf(ptx::cvt_f32<kType>(u16(x[i])), ptx::cvt_f32<kType>(u16(y[i])), sum);
    sum = fmaf(ptx::cvt_f32<kType>(u16(x[i] >> 16)), ptx::cvt_f32<kType>(u16(y[i] >> 16)), sum);
  }
  return sum;
}

// A block per (tile of queries, head, sequence); kLanes neighbours share a row. Four blocks a multiprocessor: left
// alone, the compiler takes so few registers that it spills.
template <BwdPreConfig C>
__global__ __launch_bounds__(threads(C), 4) void bwd_pre(const __grid_constant__ BwdLaunch l) {
  static_assert(valid(C));
  constexpr DType kType = DType(C.dtype);
  constexpr int kThreads = threads(C), kLanes = 8, kDown = kThreads / kLanes, kM = C.block_m;
  constexpr float kLog2e = 1.44269504088896340736f;
  __shared__ float sink_of_warp[kThreads / 32];

  const AttnParams& p = l.p.fwd;
  const SeqInfo seq = SeqInfo::of(p, blockIdx.z);
  const i64 tile = blockIdx.x, head = blockIdx.y, row0 = tile * kM;
  const int lane = int(threadIdx.x) % kLanes, first = int(threadIdx.x) / kLanes;
  float sink = 0.f;
  if (row0 < seq.rows_q) {
    const i64 at = head * l.q_tiles + l.first_q_tile(seq, kM) + tile;
    float4* acc = reinterpret_cast<float4*>(l.dq_acc + at * l.dq_tile);
    for (i64 i = threadIdx.x; i < l.dq_tile / 4; i += kThreads) acc[i] = make_float4(0.f, 0.f, 0.f, 0.f);
    if (l.turns && threadIdx.x < l.turns_per_tile) {
      const Walk walk = mask_of(p, seq).visit(row0, row0 + kM, l.block_n);
      const BwdTurns turns = BwdTurns::of(walk);
      const i64 left = l.turns_per_tile - threadIdx.x;
      const u32 first = u32(walk.run[0].end > walk.run[0].begin ? walk.run[0].begin : walk.run[1].begin);
      l.turns[at * l.turns_per_tile + threadIdx.x] = left == 2 ? turns.jump_from : left == 1 ? turns.jump_to : first;
    }

    const u16 *out = static_cast<const u16*>(p.out.data), *dout = static_cast<const u16*>(l.p.dout.data);
    float* stats = l.stats + at * 2 * kM;
    for (int r = first; r < kM; r += kDown) {
      const i64 i = row0 + r;
      const bool used = i < seq.seqlen_q;
      float sum = 0.f;
      if (used) {
        const u16 *o = out + seq.q_index(p.out, i, head), *g = dout + seq.q_index(l.p.dout, i, head);
#pragma unroll
        for (int c = 0; c < C.head_dim_v; c += kLanes * 8)
          if (c + lane * 8 < C.head_dim_v)
            sum = dot_8<kType>(*reinterpret_cast<const uint4*>(o + c + lane * 8),
                               *reinterpret_cast<const uint4*>(g + c + lane * 8), sum);
      }
#pragma unroll
      for (int x = 1; x < kLanes; x *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, x);
      if (lane != 0) continue;
      float shift = kNegInfinity, delta = 0.f;
      if (used) {
        const i64 n = seq.lse_index(p, i, head);
        const float lse = p.lse[n];
        shift = -lse * kLog2e;
        if (lse != kInfinity) delta = sum - (l.p.dlse ? l.p.dlse[n] : 0.f);
        if (l.sinks) sink -= probability(p.s_aux[head], lse) * delta;
      }
      stats[r] = shift;
      stats[kM + r] = delta;
    }
  }
  if (!l.sinks) return;
#pragma unroll
  for (int x = kLanes; x < 32; x *= 2) sink += __shfl_xor_sync(0xffffffffu, sink, x);
  if (threadIdx.x % 32 == 0) sink_of_warp[threadIdx.x / 32] = sink;
  __syncthreads();  // every warp's sum is there
  if (threadIdx.x != 0) return;
  float sum = 0.f;
  for (int w = 0; w < kThreads / 32; ++w) sum += sink_of_warp[w];
  l.sinks[(head * p.batch + blockIdx.z) * l.max_q_tiles + tile] = sum;
}

}  // namespace strobe
