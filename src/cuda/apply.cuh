// What happens to a fragment of scores between the two multiplications: score function, mask, running softmax, dropout.
#pragma once

#include "core/mask.h"
#include "core/philox.h"
#include "core/softmax.h"
#include "cuda/tile/fragment.cuh"

namespace strobe {

// A row's visible keys (mask.h's Keys) as they lie in shared memory.
struct RowKeys {
  i32 kept_end, begin, end, pad;
};

template <class Int>
__device__ __forceinline__ RowKeys row_keys(const BasicMask<Int>& mask, i32 i) {
  if (i >= mask.seqlen_q) return {0, 0, 0, 0};
  const BasicKeys<Int> keys = mask.keys(i);
  return {i32(keys.kept_end), i32(keys.begin), i32(keys.end), 0};
}

// Column 0 of the fragment is key `first`; keys_of(r) gives fragment row r's keys.
template <int kM, int kN, class KeysOf>
__device__ __forceinline__ void apply_mask(Fragment<kM, kN>& s, i32 first, KeysOf keys_of) {
  using F = Fragment<kM, kN>;
  static_assert(F::kCols <= 64);
#pragma unroll
  for (int r = 0; r < F::kRows; ++r) {
    const RowKeys keys = keys_of(r);
    // A lane's even columns as bits, which lie 8 keys apart, then its odd ones.
#pragma unroll
    for (int odd = 0; odd < 2; ++odd) {
      const i32 origin = first + F::col(odd);
      const auto before = [&](i32 key) { return ptx::low_bits((key - origin + 7) >> 3); };
      const u32 seen = (before(keys.end) & ~before(keys.begin)) | before(keys.kept_end);
#pragma unroll
      for (int bit = 0; bit < F::kCols / 2; ++bit)
        if ((seen >> bit & 1) == 0) s.at(r, 2 * bit + odd) = kNegInfinity;
    }
  }
}

// 1 - 2 / (1 + e^2x) has an absolute error of 1e-7, which is much beside a small x, and softcap multiplies it: small x
// take an odd polynomial, fitted with a relative error of 1.1e-7. No branch.
__device__ __forceinline__ float tanh_of(float x) {
  const float t = x * x;
  const float poly = -0.3333289f + t * (0.13319334f + t * (-0.05257895f + t * 0.01625563f));
  const float small = x + x * t * poly, large = 1.f - 2.f * ptx::rcp(1.f + ptx::ex2(2.f * kLog2e * x));
  return fabsf(x) < 0.5625f ? small : large;
}

// q.k to log2(e) * score (score.h), where that is more than a positive factor.
// bias_of(r) gives slope * log2(e) and the key at which row r's bias is 0, relative to the fragment's column 0.
struct RowBias {
  float slope, origin;
};
template <bool kSoftcap, bool kBias, int kM, int kN, class BiasOf>
__device__ __forceinline__ void apply_score(Fragment<kM, kN>& s, float scale, float softcap, BiasOf bias_of) {
  using F = Fragment<kM, kN>;
  const float to_cap = kSoftcap ? scale / softcap : 0.f;
  const float cap_log2 = softcap * kLog2e;
#pragma unroll
  for (int r = 0; r < F::kRows; ++r) {
    RowBias bias{};
    if constexpr (kBias) bias = bias_of(r);
#pragma unroll
    for (int c = 0; c < F::kCols; ++c) {
      float x = s.at(r, c);
      if constexpr (kSoftcap)
        x = cap_log2 * tanh_of(x * to_cap);
      else
        x *= scale * kLog2e;
      if constexpr (kBias) x -= bias.slope * fabsf(bias.origin - float(F::col(c)));
      s.at(r, c) = x;
    }
  }
}

// The running softmax of a fragment's rows. Maxima are in units of the scores; `sum` is this lane's share of the row.
template <int kRows>
struct RunningSoftmax {
  float max[kRows], sum[kRows];

  // A reference that lags behind the true maximum by up to 2^kLag costs no accuracy and saves most rescaling.
  static constexpr float kLag = 8.f;

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int r = 0; r < kRows; ++r) max[r] = kNegInfinity, sum[r] = 0.f;
  }

  // The references that these scores ask for, in `now`. True, for the whole warp, if one has to move.
  template <int kM, int kN>
  __device__ __forceinline__ bool references(const Fragment<kM, kN>& s, float log2_scale, float (&now)[kRows]) const {
    using F = Fragment<kM, kN>;
    static_assert(F::kRows == kRows);
    bool moves = false;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      now[r] = s.at(r, 0);
#pragma unroll
      for (int c = 1; c < F::kCols; ++c) now[r] = fmaxf(now[r], s.at(r, c));
      now[r] = row_max(now[r]);
      moves |= (now[r] - max[r]) * log2_scale > kLag;  // false for -inf - -inf
    }
    moves = __any_sync(0xffffffffu, moves);
#pragma unroll
    for (int r = 0; r < kRows; ++r) now[r] = moves ? fmaxf(max[r], now[r]) : max[r];
    return moves;
  }

  // s becomes 2^(log2_scale * s - reference), `added` its row sums.
  template <int kM, int kN>
  __device__ __forceinline__ static void exponentiate(Fragment<kM, kN>& s, float log2_scale, const float (&now)[kRows],
                                                      float (&added)[kRows]) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float shift = shift_of(now[r]) * log2_scale;
      added[r] = 0.f;
#pragma unroll
      for (int c = 0; c < Fragment<kM, kN>::kCols; ++c) {
        s.at(r, c) = ptx::ex2(__fmaf_rn(s.at(r, c), log2_scale, -shift));
        added[r] += s.at(r, c);
      }
    }
  }

  // Brings the sums and `out`, so far against the old references, to the new ones.
  template <int kM, int kD>
  __device__ __forceinline__ void move(Fragment<kM, kD>& out, float log2_scale, const float (&now)[kRows]) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float factor = max[r] == kNegInfinity ? 0.f : ptx::ex2((max[r] - now[r]) * log2_scale);
      max[r] = now[r];
      sum[r] *= factor;
#pragma unroll
      for (int c = 0; c < Fragment<kM, kD>::kCols; ++c) out.at(r, c) *= factor;
    }
  }
};

// Zeroes dropped probabilities. The fragment's first element is (i, j) of its sequence, both multiples of 16.
template <int kM, int kN>
__device__ __forceinline__ void apply_dropout(Fragment<kM, kN>& p, const Dropout& dropout, i64 bh, i32 i, i32 j) {
#pragma unroll
  for (int m = 0; m < kM / 16; ++m)
#pragma unroll
    for (int n = 0; n < kN / 16; ++n) {
      const Philox4 draw = dropout.lane(i / 16 + m, j / 16 + n, bh, lane_id());
#pragma unroll
      for (int word = 0; word < 4; ++word) {
        float (&x)[4] = p.x[m][n * 2 + word / 2];
        if ((draw.word[word] & 0xFFFFu) >= dropout.threshold) x[word % 2 * 2] = 0.f;
        if ((draw.word[word] >> 16) >= dropout.threshold) x[word % 2 * 2 + 1] = 0.f;
      }
    }
}

}  // namespace strobe
