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

// What every query of a tile needs: -LSE in units of log2 and delta, handed to store(row, shift, delta) once per row
// that the tensors hold; where blocks take turns, whose turn it is; the tile's part of the sink's gradient. Eight
// neighbours share a row. For a whole block.
template <DType kType, int kThreads, int kM, int kDimV, class Store>
__device__ __forceinline__ void prepare_tile(const BwdLaunch& l, const SeqInfo& seq, i64 head, i64 tile, Store store) {
  constexpr int kLanes = 8, kDown = kThreads / kLanes;
  __shared__ float sink_of_warp[kThreads / 32];
  const AttnParams& p = l.p.fwd;
  const i64 row0 = tile * kM;
  const int lane = int(threadIdx.x) % kLanes, first = int(threadIdx.x) / kLanes;
  float sink = 0.f;
  if (row0 < seq.rows_q) {
    if (l.turns && threadIdx.x < l.turns_per_tile) {
      const i64 at = head * l.q_tiles + l.first_q_tile(seq, kM) + tile;
      const Walk walk = l.main_mask(seq).visit(row0, row0 + kM, l.block_n);
      const BwdTurns turns = BwdTurns::of(walk);
      const i64 left = l.turns_per_tile - threadIdx.x;
      const u32 first = u32(walk.run[0].end > walk.run[0].begin ? walk.run[0].begin : walk.run[1].begin);
      l.turns[at * l.turns_per_tile + threadIdx.x] = left == 2 ? turns.jump_from : left == 1 ? turns.jump_to : first;
    }

    // All that comes from memory first, then what depends on it: the latency is that of one read.
    constexpr int kPasses = ceil_div(kM, kDown);
    const u16 *out = static_cast<const u16*>(p.out.data), *dout = static_cast<const u16*>(l.p.dout.data);
    float lses[kPasses], sums[kPasses];
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const i64 i = row0 + first + pass * kDown;
      lses[pass] = kInfinity;
      sums[pass] = 0.f;
      if (i >= seq.seqlen_q || first + pass * kDown >= kM) continue;
      const i64 n = seq.lse_index(p, i, head);
      if (lane == 0) lses[pass] = p.lse[n];
      if (lane == 0 && l.p.dlse) sums[pass] = -l.p.dlse[n];
      const u16 *o = out + seq.q_index(p.out, i, head), *g = dout + seq.q_index(l.p.dout, i, head);
#pragma unroll
      for (int c = 0; c < kDimV; c += kLanes * 8)
        if (c + lane * 8 < kDimV)
          sums[pass] = dot_8<kType>(*reinterpret_cast<const uint4*>(o + c + lane * 8),
                                    *reinterpret_cast<const uint4*>(g + c + lane * 8), sums[pass]);
    }
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const int r = first + pass * kDown;
#pragma unroll
      for (int x = 1; x < kLanes; x *= 2) sums[pass] += __shfl_xor_sync(0xffffffffu, sums[pass], x);
      if (lane != 0 || r >= kM) continue;
      const bool used = row0 + r < seq.seqlen_q;
      const float lse = lses[pass];
      float delta = 0.f;
      if (lse != kInfinity) delta = sums[pass];
      if (used && l.sinks) sink -= probability(p.s_aux[head], lse) * delta;
      store(r, used ? -lse * kLog2e : kNegInfinity, delta);
    }
  }
  if (!l.sinks) return;
#pragma unroll
  for (int x = kLanes; x < 32; x *= 2) sink += __shfl_xor_sync(0xffffffffu, sink, x);
  if (threadIdx.x % 32 == 0) sink_of_warp[threadIdx.x / 32] = sink;
  __syncthreads();  // every warp's sum is there
  if (threadIdx.x == 0) {
    float sum = 0.f;
    for (int w = 0; w < kThreads / 32; ++w) sum += sink_of_warp[w];
    l.sinks[(head * p.batch + seq.batch) * l.max_q_tiles + tile] = sum;
  }
}

// A block per (tile of queries, head, sequence). Four blocks a multiprocessor: left alone, the compiler takes so few
// registers that it spills.
template <BwdPreConfig C>
__global__ __launch_bounds__(threads(C), C.head_dim_v > 128 ? 2 : 4) void bwd_pre(const __grid_constant__ BwdLaunch l) {
  static_assert(valid(C));
  constexpr int kThreads = threads(C), kM = C.block_m;
  const SeqInfo seq = SeqInfo::of(l.p.fwd, blockIdx.z);
  const i64 tile = blockIdx.x, head = blockIdx.y;
  const i64 at = head * l.q_tiles + l.first_q_tile(seq, kM) + tile;
  if (tile * kM < seq.rows_q) {
    float4* acc = reinterpret_cast<float4*>(l.dq_acc + at * l.dq_tile);
    for (i64 i = threadIdx.x; i < l.dq_tile / 4; i += kThreads) acc[i] = make_float4(0.f, 0.f, 0.f, 0.f);
  }
  float* stats = l.stats + at * 2 * kM;
  prepare_tile<DType(C.dtype), kThreads, kM, C.head_dim_v>(l, seq, head, tile, [&](int r, float shift, float delta) {
    stats[r] = shift;
    stats[kM + r] = delta;
  });
}

}  // namespace strobe
