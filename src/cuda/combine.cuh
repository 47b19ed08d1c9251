// Merges the parts of a split forward pass. Few rows of many parts have a block each, whose warps share the parts; else
// each warp has a few rows that follow each other, so that many loads are under way. The learned sink joins here, once.
#pragma once

#include "core/config.h"
#include "core/launch.h"
#include "core/softmax.h"
#include "cuda/epilogue.cuh"
#include "cuda/ptx/grid.cuh"
#include "cuda/ptx/memory.cuh"

namespace strobe {

template <CombineConfig C>
struct Combine {
  static constexpr int kDim = C.head_dim_v, kEach = (kDim + 127) / 128;  // a lane's groups of four columns of a row
  static constexpr int kTogether = kEach < 4 ? 4 / kEach : 1;            // parts whose loads are under way at once

  __device__ __forceinline__ static int column(int e) { return e * 128 + lane_id() * 4; }
  __device__ __forceinline__ static void add(float4& sum, const float4& x, float factor = 1.f) {
    sum.x += x.x * factor;
    sum.y += x.y * factor;
    sum.z += x.z * factor;
    sum.w += x.w * factor;
  }
  __device__ __forceinline__ static void write(const AttnParams& p, u16* out, float4 (&sum)[kEach], float scale) {
    const bool zero = scale == 0.f;
    if (p.dropout_p > 0.f) scale *= 1.f / (1.f - p.dropout_p);
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      const auto pair = [&](float a, float b) {
        return zero ? 0u : ptx::cvt_pair<DType(C.dtype)>(a * scale, b * scale);
      };
      const uint2 packed = {pair(sum[e].x, sum[e].y), pair(sum[e].z, sum[e].w)};
      if (column(e) < kDim) *reinterpret_cast<uint2*>(out + column(e)) = packed;
    }
  }
};

// The state of a row whose parts lanes hold, those whose numbers differ from bit `kFirst` on. Returns the factor of the
// lane's own part.
template <int kFirst>
__device__ __forceinline__ float join(RowState& row) {
  const float mine = row.max;
  for (int step = kFirst; step < 32; step *= 2) row.max = max(row.max, __shfl_xor_sync(0xffffffffu, row.max, step));
  const float factor = row.sum != 0.f ? rescale(mine, row.max) : 0.f;
  row.sum *= factor;
  for (int step = kFirst; step < 32; step *= 2) row.sum += __shfl_xor_sync(0xffffffffu, row.sum, step);
  return factor;
}

// A block's row.
template <CombineConfig C>
__device__ __forceinline__ void combine_row(const CombineLaunch& launch) {
  using Own = Combine<C>;
  constexpr int kDim = Own::kDim, kEach = Own::kEach, kTogether = Own::kTogether;
  extern __shared__ __align__(1024) unsigned char smem[];
  const AttnParams& p = launch.p;
  u32 n = blockIdx.x;
  const u32 i = launch.rows.take(n), h = launch.heads.take(n);
  const SeqInfo seq = SeqInfo::of(p, n);
  ptx::wait_for_prerequisites();
  if (i >= seq.rows_q) return;
  const int lane = lane_id(), warp = warp_id(), parts = launch.num_splits;
  const bool used = i < seq.seqlen_q;
  const i64 first = h * p.total_q + global_row(p, seq, i), stride = p.num_heads * p.total_q;

  // Every warp finds the row's maximum, so that parts need no further rescaling.
  RowState row;
  const float2* const state = reinterpret_cast<const float2*>(launch.partial_state);
  for (int part = lane; used && part < parts; part += 32) {
    const float2 s = state[first + part * stride];
    merge(row, {s.x, s.y});
  }
  join<1>(row);

  float4 sum[kEach] = {};
#pragma unroll 1
  for (int begin = warp; used && begin < parts; begin += kCombineWarps * kTogether) {
    float2 s[kTogether];
    float4 x[kTogether][kEach];
    i64 at[kTogether];
#pragma unroll
    for (int t = 0; t < kTogether; ++t) {
      const int part = begin + t * kCombineWarps;
      at[t] = first + min(part, parts - 1) * stride;
      s[t] = state[at[t]];
      if (part >= parts) s[t].y = 0.f;
    }
    // Nothing branches between the loads. A part that saw no key was not written.
#pragma unroll
    for (int t = 0; t < kTogether; ++t)
#pragma unroll
      for (int e = 0; e < kEach; ++e) {
        const int col = Own::column(e);
        x[t][e] = ptx::ld_global_16(launch.partial_out + at[t] * kDim + col, s[t].y != 0.f && col < kDim);
      }
#pragma unroll
    for (int t = 0; t < kTogether; ++t) {
      const float factor = s[t].y != 0.f ? rescale(s[t].x, row.max) : 0.f;
#pragma unroll
      for (int e = 0; e < kEach; ++e) Own::add(sum[e], x[t][e], factor);
    }
  }

  float4* const shared = reinterpret_cast<float4*>(smem);
#pragma unroll
  for (int e = 0; e < kEach; ++e) {
    const int col = Own::column(e);
    if (warp > 0 && col < kDim) shared[((warp - 1) * kDim + col) / 4] = sum[e];
  }
  __syncthreads();  // the others' sums are there
  if (warp > 0) return;
  RowResult result = {0.f, kInfinity};
  if (used) result = finalize(row, p.s_aux ? p.s_aux + h : nullptr);
#pragma unroll
  for (int e = 0; e < kEach; ++e) {
    const int col = Own::column(e);
#pragma unroll
    for (int other = 0; other < kCombineWarps - 1; ++other)
      if (col < kDim) Own::add(sum[e], shared[(other * kDim + col) / 4]);
  }

  if (p.lse && lane == 0) p.lse[seq.lse_index(p, i, h)] = result.lse;
  Own::write(p, static_cast<u16*>(p.out.data) + seq.q_index(p.out, i, h), sum, result.scale);
}

// A warp's rows, of at most kFewParts parts: a lane looks at one part of one row.
template <CombineConfig C>
__device__ __forceinline__ void combine_rows(const CombineLaunch& launch) {
  using Own = Combine<C>;
  constexpr int kDim = Own::kDim, kEach = Own::kEach, kTogether = Own::kTogether, kRows = kCombineRows;
  static_assert(kRows * kFewParts == 32 && kFewParts % kTogether == 0);
  const AttnParams& p = launch.p;
  u32 n = blockIdx.x * kCombineWarps + warp_id();
  const u32 i = launch.rows.take(n) * kRows, h = launch.heads.take(n);
  if (n >= p.batch) return;
  const SeqInfo seq = SeqInfo::of(p, n);
  ptx::wait_for_prerequisites();
  if (i >= seq.rows_q) return;
  const int r = lane_id() % kRows, part = lane_id() / kRows;
  const i64 first = h * p.total_q + global_row(p, seq, i), stride = p.num_heads * p.total_q;
  const bool used = i + r < seq.seqlen_q;

  RowState row;
  if (used && part < launch.num_splits) {
    const float2 s = reinterpret_cast<const float2*>(launch.partial_state)[first + r + part * stride];
    row = {s.x, s.y};
  }
  const u32 seen = __ballot_sync(0xffffffffu, row.sum != 0.f);  // a part that saw no key was not written
  float factor = 0.f;

  float4 sum[kRows][kEach] = {};
#pragma unroll 1
  for (int begin = 0; begin < launch.num_splits; begin += kTogether) {
    float4 x[kTogether][kRows][kEach];
    const float* const from = launch.partial_out + (first + begin * stride) * kDim;
#pragma unroll
    for (int t = 0; t < kTogether; ++t)
#pragma unroll
      for (int q = 0; q < kRows; ++q)
#pragma unroll
        for (int e = 0; e < kEach; ++e) {
          const bool there = (seen >> ((begin + t) * kRows + q) & 1) && Own::column(e) < kDim;
          x[t][q][e] = ptx::ld_global_16(from + (t * stride + q) * kDim + Own::column(e), there);
        }
    if (begin == 0) factor = join<kRows>(row);  // under the first loads
#pragma unroll
    for (int t = 0; t < kTogether; ++t)
#pragma unroll
      for (int q = 0; q < kRows; ++q) {
        const float own = __shfl_sync(0xffffffffu, factor, (begin + t) * kRows + q);
#pragma unroll
        for (int e = 0; e < kEach; ++e) Own::add(sum[q][e], x[t][q][e], own);
      }
  }

  RowResult result = {0.f, kInfinity};
  if (used) result = finalize(row, p.s_aux ? p.s_aux + h : nullptr);
  if (p.lse && part == 0 && i + r < seq.rows_q) p.lse[seq.lse_index(p, i + r, h)] = result.lse;
#pragma unroll
  for (int q = 0; q < kRows; ++q) {
    const float scale = __shfl_sync(0xffffffffu, result.scale, q);
    if (i + q < seq.rows_q) Own::write(p, static_cast<u16*>(p.out.data) + seq.q_index(p.out, i + q, h), sum[q], scale);
  }
}

template <CombineConfig C>
__global__ __launch_bounds__(threads(C)) void combine(const __grid_constant__ CombineLaunch launch) {
  static_assert(valid(C));
  if constexpr (C.rows == 1)
    combine_row<C>(launch);
  else
    combine_rows<C>(launch);
}

}  // namespace strobe
