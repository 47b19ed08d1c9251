// The running softmax of apply.cuh in the order that Hopper's loop wants: the sum runs on through the exponentials,
// which the assembler can then only place before what follows them, and the output is left to be rescaled later.
#pragma once

#include "cuda/apply.cuh"

namespace strobe {

struct Sm90Softmax {
  RunningSoftmax<2> rows;
  float factor[2];  // what the output so far is to be multiplied by, where update() says so

  // s becomes 2^(log2_scale * s - reference). True, for the whole warp, if a reference has moved. kFirst: there is no
  // earlier tile.
  template <bool kFirst, int kN>
  __device__ __forceinline__ bool update(Fragment<16, kN>& s, float log2_scale) {
    constexpr int kCols = Fragment<16, kN>::kCols;
    float now[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float a = kFirst ? s.at(r, 0) : fmaxf(rows.max[r], s.at(r, 0)),
            b = s.at(r, 1);  // two chains are shorter than one
#pragma unroll
      for (int c = 2; c < kCols; c += 2) {
        a = fmaxf(a, s.at(r, c));
        b = fmaxf(b, s.at(r, c + 1));
      }
      now[r] = row_max(fmaxf(a, b));
    }
    bool moves = true;
    if constexpr (!kFirst) {
      // False for -inf - -inf.
      const float grown = fmaxf(now[0] - rows.max[0], now[1] - rows.max[1]);
      moves = __any_sync(0xffffffffu, grown * log2_scale > RunningSoftmax<2>::kLag);
      if (!moves) now[0] = rows.max[0], now[1] = rows.max[1];
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float shift = shift_of(now[r]) * log2_scale;
      float sum = 0.f;
      if constexpr (!kFirst) {
        factor[r] = ptx::ex2(__fmaf_rn(rows.max[r], log2_scale, -shift));
        sum = rows.sum[r] * factor[r];
      }
      rows.max[r] = now[r];
#pragma unroll
      for (int c = 0; c < kCols; ++c) {
        s.at(r, c) = ptx::ex2(__fmaf_rn(s.at(r, c), log2_scale, -shift));
        sum += s.at(r, c);
      }
      rows.sum[r] = sum;
    }
    return moves;
  }

  template <int kD>
  __device__ __forceinline__ void rescale(Fragment<16, kD>& out) const {
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int c = 0; c < Fragment<16, kD>::kCols; ++c) out.at(r, c) *= factor[r];
  }
};

}  // namespace strobe
