// The end of a work item of fwd_sm90: rows leave straight from registers, 16 bytes a lane, as output and LSE or as a
// partial result. Shared memory stays free for the next item's tiles.
#pragma once

#include "core/softmax.h"
#include "cuda/fwd_sm90_work.cuh"
#include "cuda/tile/softmax_sm90.cuh"

namespace strobe {

// Four registers of four lanes that share rows, transposed: lane q gets register q of each of them.
__device__ __forceinline__ void transpose_quad(u32 (&x)[4]) {
  const bool odd = lane_id() & 1, high = lane_id() & 2;
  u32 a = __shfl_xor_sync(0xffffffffu, odd ? x[0] : x[1], 1), b = __shfl_xor_sync(0xffffffffu, odd ? x[2] : x[3], 1);
  if (odd)
    x[0] = a, x[2] = b;
  else
    x[1] = a, x[3] = b;
  a = __shfl_xor_sync(0xffffffffu, high ? x[0] : x[2], 2), b = __shfl_xor_sync(0xffffffffu, high ? x[1] : x[3], 2);
  if (high)
    x[0] = a, x[1] = b;
  else
    x[2] = a, x[3] = b;
}

// row0: of the warp, in the tile.
template <FwdSm90Config C, int kD>
__device__ __forceinline__ void finish_rows(Fragment<16, kD>& out, Sm90Softmax& softmax, const FwdSm90Launch& launch,
                                            const Sm90Work& work, int row0) {
  using Output = Fragment<16, kD>;
  constexpr DType kType = DType(C.dtype);
  const AttnParams& p = launch.p;
  const i32 group = C.pack ? i32(launch.group.divisor) : 1;
  const i32 first_token = C.pack ? i32(launch.group.quotient(u32(work.first_row))) : work.first_row;
  const i32 used_q = i32(work.mask.seqlen_q);
#pragma unroll
  for (int r = 0; r < 2; ++r) softmax.sum[r] = row_sum(softmax.sum[r]);

  // The four lanes that share rows finish one row each.
  const int mine = lane_id() % 2;
  RowState state = {(mine ? softmax.reference[1] : softmax.reference[0]) * kLn2,
                    mine ? softmax.sum[1] : softmax.sum[0]};
  if (state.sum == 0.f) state.max = kNegInfinity;
  const i32 row = work.first_row + row0 + Output::row(mine);
  const i32 token = C.pack ? i32(launch.group.quotient(u32(row))) : row, head = row - token * group;
  const bool writes = lane_id() % 4 == mine;

  if constexpr (C.split != 0) {
    const i64 at = work.out + head * p.total_q + token;
    if (writes && token < used_q)
      *reinterpret_cast<float2*>(launch.partial_state + at * 2) = make_float2(state.max, state.sum);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const i64 row_at = __shfl_sync(0xffffffffu, at, r, 4);
      const bool exists = __shfl_sync(0xffffffffu, i32(token < used_q && state.sum != 0.f), r, 4);
      if (!exists) continue;  // the merge reads nothing of a row that saw no key
      float* const to = launch.partial_out + row_at * C.head_dim_v;
#pragma unroll
      for (int c = 0; c < Output::kCols; c += 2)
        if (Output::col(c) < C.head_dim_v)
          *reinterpret_cast<float2*>(to + Output::col(c)) = make_float2(out.at(r, c), out.at(r, c + 1));
    }
  } else {
    RowResult result = {0.f, kInfinity};
    if (token < used_q) result = finalize(state, p.s_aux ? p.s_aux + work.head + head : nullptr);
    if (p.lse && writes && token < work.rows_q)
      p.lse[work.lse + (C.pack ? head * p.lse_head_stride : 0) + token - first_token] = result.lse;
    const i64 offset = work.out + (token - first_token) * p.out.row_stride + (C.pack ? head * p.out.head_stride : 0);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float scale = __shfl_sync(0xffffffffu, result.scale, r, 4);
      u16* const to = static_cast<u16*>(p.out.data) + __shfl_sync(0xffffffffu, offset, r, 4);
      const bool exists = __shfl_sync(0xffffffffu, i32(token < work.rows_q), r, 4);
#pragma unroll
      for (int g = 0; g < (kD + 31) / 32; ++g) {
        u32 x[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int n = g * 4 + i;  // eight columns
          // A row that saw nothing is 0 whatever lies in out.
          if (n < kD / 8 && n * 8 < C.head_dim_v)
            x[i] = scale == 0.f ? 0 : ptx::cvt_pair<kType>(out.x[0][n][2 * r] * scale, out.x[0][n][2 * r + 1] * scale);
          else
            x[i] = 0;
        }
        transpose_quad(x);
        const int col = g * 32 + lane_id() % 4 * 8;
        if (exists && col < C.head_dim_v) *reinterpret_cast<uint4*>(to + col) = make_uint4(x[0], x[1], x[2], x[3]);
      }
    }
  }
}

}  // namespace strobe
