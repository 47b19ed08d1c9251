// The softmax of a row as a running (max, sum), mergeable (Milakov and Gimelshein, arXiv 1805.02867), and the only home
// of the infinity rules: a row without a visible key gives out 0 and LSE +inf, or LSE = sink where it has a learned
// sink.
#pragma once

#include "base.h"

namespace strobe {

constexpr float kInfinity = __builtin_bit_cast(float, 0x7f800000u);
constexpr float kNegInfinity = -kInfinity;

// sum counts exp(score - max); max is -inf while nothing was seen. Scores are in natural-log units.
struct RowState {
  float max = kNegInfinity;
  float sum = 0.f;
};

// What to subtract from scores: -inf - -inf must not become NaN in rows that saw nothing yet.
STROBE_HD float shift_of(float row_max) { return row_max == kNegInfinity ? 0.f : row_max; }

// The factor that brings sums and outputs taken against old_max to new_max (>= old_max).
STROBE_HD float rescale(float old_max, float new_max) {
  return old_max == kNegInfinity ? 0.f : exp_f32(old_max - new_max);
}

// Merges b into a; outputs are scaled by the two factors and added.
struct MergeFactors {
  float a, b;
};
STROBE_HD MergeFactors merge(RowState& a, const RowState& b) {
  const float m = max(a.max, b.max);
  const MergeFactors factors = {rescale(a.max, m), rescale(b.max, m)};
  a.sum = a.sum * factors.a + b.sum * factors.b;
  a.max = m;
  return factors;
}

// The output is the accumulated one times `scale`.
struct RowResult {
  float scale, lse;
};
STROBE_HD RowResult finalize(const RowState& row, const float* sink) {
  // A row of NaN scores has no maximum either, but its sum says so.
  if (row.max == kNegInfinity && row.sum == 0.f) return {0.f, sink ? *sink : kInfinity};
  // The sink joins the maximum too, so that one far above every score cannot overflow.
  const float m = sink ? max(row.max, *sink) : row.max;
  const float sum = sink ? row.sum * rescale(row.max, m) + rescale(*sink, m) : row.sum;
  return {rescale(row.max, m) / sum, m + log_f32(sum)};
}

// exp(score - lse) of the backward pass: 0 where the row saw nothing.
STROBE_HD float probability(float score, float lse) { return lse == kInfinity ? 0.f : exp_f32(score - lse); }

}  // namespace strobe
