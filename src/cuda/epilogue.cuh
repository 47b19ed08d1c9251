// The end of a row block: warps that shared rows merge, and rows leave as output and LSE or as a partial result.
#pragma once

#include "core/launch.h"
#include "core/seqlen.h"
#include "cuda/apply.cuh"

namespace strobe {

// Adds up the fragments of warps that saw different keys of the same rows; the result is that of warp_n 0. `scratch`
// lies in shared memory that nobody reads any more. Elements keep their lanes, so the exchange has no bank conflicts.
template <int kWarpsM, int kWarpsN, int kM, int kD, int kRows>
__device__ __forceinline__ void merge_warps(Fragment<kM, kD>& out, RunningSoftmax<kRows>& rows, float log2_scale,
                                            int warp_m, int warp_n, float* scratch) {
  constexpr int kElements = kM * kD / 32 + 2 * kRows, kStride = kWarpsM * kElements * 32;
  float* own = scratch + warp_m * kElements * 32 + lane_id();
  if (warp_n > 0) {
    own += (warp_n - 1) * kStride;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      own[(2 * r) * 32] = rows.max[r];
      own[(2 * r + 1) * 32] = rows.sum[r];
#pragma unroll
      for (int c = 0; c < kD / 4; ++c) own[(2 * kRows + r * kD / 4 + c) * 32] = out.at(r, c);
    }
  }
  __syncthreads();
  if (warp_n > 0) return;
#pragma unroll 1
  for (int other = 0; other < kWarpsN - 1; ++other, own += kStride) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float theirs = own[(2 * r) * 32], now = fmaxf(rows.max[r], theirs);
      const float a = rows.max[r] == kNegInfinity ? 0.f : ptx::ex2((rows.max[r] - now) * log2_scale);
      const float b = theirs == kNegInfinity ? 0.f : ptx::ex2((theirs - now) * log2_scale);
      // A row of NaN scores has no maximum, but its sum must survive.
      const float their_sum = own[(2 * r + 1) * 32];
      rows.sum[r] = (rows.sum[r] == 0.f ? 0.f : rows.sum[r] * a) + (their_sum == 0.f ? 0.f : their_sum * b);
      rows.max[r] = now;
#pragma unroll
      for (int c = 0; c < kD / 4; ++c) out.at(r, c) = out.at(r, c) * a + own[(2 * kRows + r * kD / 4 + c) * 32] * b;
    }
  }
}

// Row of lse, partial_out and partial_state among all rows of q.
__device__ __forceinline__ i64 global_row(const AttnParams& p, const SeqInfo& seq, i64 i) {
  return seq.q_batch * p.seqlen_q + seq.q_begin + i;
}

// Writes a warp's rows through shared memory, 16 bytes at a time. `tile` is this block's; a warp touches its own rows
// only. pointer_of(row) gives where the tile's row goes, or null.
template <DType kType, int kDim, class Tile, int kM, int kD, class PointerOf>
__device__ __forceinline__ void store_rows(const Fragment<kM, kD>& out, const Tile& tile, int row0,
                                           PointerOf pointer_of) {
  using F = Fragment<kM, kD>;
#pragma unroll
  for (int r = 0; r < F::kRows; ++r)
#pragma unroll
    for (int c = 0; c < F::kCols; c += 2)
      ptx::st_shared_4(tile.address(row0 + F::row(r), F::col(c)), ptx::cvt_pair<kType>(out.at(r, c), out.at(r, c + 1)));
  __syncwarp();
  constexpr int kAcross = kD % 64 == 0 ? 8 : kD % 32 == 0 ? 4 : 2, kDown = 32 / kAcross;
#pragma unroll 4
  for (int r = lane_id() / kAcross; r < kM; r += kDown) {
    u16* to = pointer_of(row0 + r);
    if (to == nullptr) continue;
#pragma unroll
    for (int c = lane_id() % kAcross * 8; c < kD; c += kAcross * 8)
      if (c < kDim) *reinterpret_cast<uint4*>(to + c) = ptx::ld_shared_16(tile.address(row0 + r, c));
  }
}

}  // namespace strobe
