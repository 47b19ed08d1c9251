// exp and tanh of vectors, to about 2e-7 of the value.
#pragma once

#include "core/base.h"
#include "simd.h"

namespace strobe::cpu::STROBE_ISA {

// 2^x. Below 2^-126 it is 0, so exp2(-inf) = 0; NaN stays NaN.
STROBE_INLINE vf exp2(vf x) {
  constexpr float kRound = 0x1.8p23f;  // adding it leaves the rounded integer in the low bits
  const vf low = broadcast(-127.f), high = broadcast(127.49f);
  x = x < low ? low : x;
  x = x > high ? high : x;
  const vf shifted = x + kRound;
  const vf f = x - (shifted - kRound);
  const vi power = (vi(shifted) + (127 - 0x4B400000)) << 23;
  vf p = broadcast(1.535336188319500e-4f);
  p = fma(p, f, broadcast(1.339887440266574e-3f));
  p = fma(p, f, broadcast(9.618437357674640e-3f));
  p = fma(p, f, broadcast(5.550332471162809e-2f));
  p = fma(p, f, broadcast(2.402264791363012e-1f));
  p = fma(p, f, broadcast(6.931472028550421e-1f));
  p = fma(p, f, broadcast(1.f));
  return p * vf(power);
}

STROBE_INLINE vf exp(vf x) { return exp2(x * kLog2e); }

STROBE_INLINE vf tanh(vf x) {
  const vf magnitude = x < 0.f ? -x : x;
  const vf far = 1.f - 2.f / (exp2(magnitude * (2.f * kLog2e)) + 1.f);
  const vf z = x * x;
  vf p = broadcast(-5.70498872745e-3f);
  p = fma(p, z, broadcast(2.06390887954e-2f));
  p = fma(p, z, broadcast(-5.37397155531e-2f));
  p = fma(p, z, broadcast(1.33314422036e-1f));
  p = fma(p, z, broadcast(-3.33332819422e-1f));
  const vf near = fma(p * z, x, x);
  return magnitude < 0.625f ? near : x < 0.f ? -far : far;
}

}  // namespace strobe::cpu::STROBE_ISA
