// Merges the parts of a split forward pass. Few rows of many parts have a block each, whose warps share the parts; else
// each warp has a row. The learned sink joins here, once.
#pragma once

#include "core/config.h"
#include "core/launch.h"
#include "core/softmax.h"
#include "cuda/epilogue.cuh"
#include "cuda/ptx/grid.cuh"
#include "cuda/ptx/memory.cuh"

namespace strobe {

template <CombineConfig C>
__global__ __launch_bounds__(threads(C)) void combine(const __grid_constant__ CombineLaunch launch) {
  static_assert(valid(C));
  constexpr DType kType = DType(C.dtype);
  constexpr bool kShares = C.rows == 1;
  constexpr int kWarps = kShares ? kCombineWarps : 1, kDim = C.head_dim_v;  // of a row
  constexpr int kEach = (kDim + 127) / 128;                                 // a lane's groups of four columns
  extern __shared__ __align__(1024) unsigned char smem[];

  const AttnParams& p = launch.p;
  u32 n = blockIdx.x * C.rows + (kShares ? 0 : warp_id());
  const u32 i = launch.rows.take(n), h = launch.heads.take(n);
  if (!kShares && n >= p.batch) return;
  const SeqInfo seq = SeqInfo::of(p, n);
  ptx::wait_for_prerequisites();
  if (i >= seq.rows_q) return;
  u16* const out = static_cast<u16*>(p.out.data) + seq.q_index(p.out, i, h);
  const int lane = lane_id(), warp = kShares ? warp_id() : 0;
  const bool used = i < seq.seqlen_q;
  const i64 first = h * p.total_q + global_row(p, seq, i), stride = p.num_heads * p.total_q;

  // Every warp finds the row's maximum, so that parts need no further rescaling.
  RowState row;
  const float2* const state = reinterpret_cast<const float2*>(launch.partial_state);
  if (used) {
    for (int part = lane; part < launch.num_splits; part += 32) {
      const float2 s = state[first + part * stride];
      merge(row, {s.x, s.y});
    }
    for (int step = 16; step > 0; step /= 2)
      merge(row, {__shfl_xor_sync(0xffffffffu, row.max, step), __shfl_xor_sync(0xffffffffu, row.sum, step)});
  }

  float4 sum[kEach] = {};
  if (used) {
    // Loads of several parts are under way at once: nothing branches between them.
    constexpr int kTogether = kEach < 4 ? 4 / kEach : 1;
    const int last = launch.num_splits - 1;
#pragma unroll 1
    for (int begin = warp; begin <= last; begin += kWarps * kTogether) {
      float2 s[kTogether];
      float4 x[kTogether][kEach];
      i64 at[kTogether];
#pragma unroll
      for (int t = 0; t < kTogether; ++t) {
        const int part = begin + t * kWarps;
        at[t] = first + min(part, last) * stride;
        s[t] = state[at[t]];
        if (part > last) s[t].y = 0.f;
      }
#pragma unroll
      for (int t = 0; t < kTogether; ++t)
#pragma unroll
        for (int e = 0; e < kEach; ++e) {
          const int col = e * 128 + lane * 4;  // a part that saw no key was not written
          x[t][e] = ptx::ld_global_16(launch.partial_out + at[t] * kDim + col, s[t].y != 0.f && col < kDim);
        }
#pragma unroll
      for (int t = 0; t < kTogether; ++t) {
        const float factor = s[t].y != 0.f ? rescale(s[t].x, row.max) : 0.f;
#pragma unroll
        for (int e = 0; e < kEach; ++e) {
          sum[e].x += x[t][e].x * factor;
          sum[e].y += x[t][e].y * factor;
          sum[e].z += x[t][e].z * factor;
          sum[e].w += x[t][e].w * factor;
        }
      }
    }
  }
  float4* const shared = reinterpret_cast<float4*>(smem);
  if constexpr (kShares) {
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      const int col = e * 128 + lane * 4;
      if (warp > 0 && col < kDim) shared[((warp - 1) * kDim + col) / 4] = sum[e];
    }
    __syncthreads();  // the others' sums are there
    if (warp > 0) return;
  }

  RowResult result = {0.f, kInfinity};
  if (used) result = finalize(row, p.s_aux ? p.s_aux + h : nullptr);
  if (p.lse && lane == 0) p.lse[seq.lse_index(p, i, h)] = result.lse;
  const float keep = p.dropout_p > 0.f ? 1.f / (1.f - p.dropout_p) : 1.f;
#pragma unroll
  for (int e = 0; e < kEach; ++e) {
    const int col = e * 128 + lane * 4;
    if (col >= kDim) continue;
    float4 x = sum[e];
    for (int other = 0; other < kWarps - 1; ++other) {
      const float4 y = shared[(other * kDim + col) / 4];
      x.x += y.x;
      x.y += y.y;
      x.z += y.z;
      x.w += y.w;
    }
    const float scale = result.scale * keep;
    const bool zero = result.scale == 0.f;
    uint2 packed;
    packed.x = zero ? 0u : ptx::cvt_pair<kType>(x.x * scale, x.y * scale);
    packed.y = zero ? 0u : ptx::cvt_pair<kType>(x.z * scale, x.w * scale);
    *reinterpret_cast<uint2*>(out + col) = packed;
  }
}

}  // namespace strobe
