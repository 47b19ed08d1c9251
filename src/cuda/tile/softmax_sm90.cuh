// The running softmax of Hopper's loop: as apply.cuh's, but nothing is said between lanes while no reference moves, the
// sum runs on through the exponentials, which the assembler can then only place before what follows them, and the
// output is left to be rescaled later.
#pragma once

#include "cuda/apply.cuh"

namespace strobe {

struct Sm90Softmax {
  float reference[2];  // of each row, as an exponent of 2; the four lanes that share a row agree
  float sum[2];        // this lane's share of the row
  float factor[2];     // what the output so far is to be multiplied by, where update() says so

  static constexpr float kNone = -3.4e38f;  // finite: -inf less the reference of a row without keys is no NaN
  static constexpr float kMost = 1024.f;    // of a lane's exponentials of a tile, together: half types hold more

  __device__ __forceinline__ void clear() {
    reference[0] = reference[1] = kNone;
    sum[0] = sum[1] = 0.f;
  }

  // s becomes 2^(log2_scale * s - reference). True, for the whole warp, if a reference has moved. Each lane looks at
  // its own maximum only: lanes that share a row ask each other for theirs when one of the warp is too large.
  template <int kN>
  __device__ __forceinline__ bool update(Fragment<16, kN>& s, float log2_scale, bool must = false) {
    constexpr int kCols = Fragment<16, kN>::kCols;
    float now[2], above[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float a = s.at(r, 0), b = s.at(r, 1);  // two chains are shorter than one
#pragma unroll
      for (int c = 2; c < kCols; c += 2) {
        a = fmaxf(a, s.at(r, c));
        b = fmaxf(b, s.at(r, c + 1));
      }
      now[r] = fmaxf(a, b);
      above[r] = __fmaf_rn(now[r], log2_scale, -reference[r]);
    }
    const bool moves = must || __any_sync(0xffffffffu, fmaxf(above[0], above[1]) > RunningSoftmax<2>::kLag);
    if (moves) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float next = row_max(fmaxf(reference[r], now[r] * log2_scale));
        factor[r] = ptx::ex2(reference[r] - next);
        sum[r] *= factor[r];
        reference[r] = next;
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int c = 0; c < kCols; ++c) {
        s.at(r, c) = ptx::ex2(__fmaf_rn(s.at(r, c), log2_scale, -reference[r]));
        sum[r] += s.at(r, c);
      }
    }
    return moves;
  }

  // The same against the references as they are: nothing is asked of s before its exponentials. False, for the whole
  // warp, if their sums tell that a reference has to move: s is to be had again, for update(). pack: takes s meanwhile.
  template <int kN, class Pack>
  __device__ __forceinline__ bool add(Fragment<16, kN>& s, float log2_scale, Pack pack) {
    float added[2] = {0.f, 0.f};
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int c = 0; c < Fragment<16, kN>::kCols; ++c) {
        s.at(r, c) = ptx::ex2(__fmaf_rn(s.at(r, c), log2_scale, -reference[r]));
        added[r] += s.at(r, c);
      }
    pack();
    if (__any_sync(0xffffffffu, fmaxf(added[0], added[1]) > kMost)) return false;
    sum[0] += added[0];
    sum[1] += added[1];
    return true;
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
