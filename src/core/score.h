// From q.k to the score that the softmax sees: scale, then softcap, then ALiBi; and the derivative of that.
#pragma once

#include "base.h"

namespace strobe {

struct Score {
  float scale;
  float softcap;      // 0: off. softcap * tanh(scale * qk / softcap)
  float alibi_slope;  // 0: off. minus slope * |i + off - j|

  STROBE_HD float capped(float qk) const {
    const float s = scale * qk;
    return softcap == 0.f ? s : softcap * tanh_f32(s / softcap);
  }
  STROBE_HD float bias(i64 i, i64 j, i64 off) const {
    const i64 distance = i + off - j;
    return -alibi_slope * float(distance < 0 ? -distance : distance);
  }
  STROBE_HD float apply(float qk, i64 i, i64 j, i64 off) const {
    return alibi_slope == 0.f ? capped(qk) : capped(qk) + bias(i, j, off);
  }
  // d apply / d qk, from the value of capped(qk).
  STROBE_HD float derivative(float capped_value) const {
    if (softcap == 0.f) return scale;
    const float t = capped_value / softcap;
    return scale * (1.f - t * t);
  }
};

}  // namespace strobe
