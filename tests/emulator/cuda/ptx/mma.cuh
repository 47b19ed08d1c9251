// Stands in for src/cuda/ptx/mma.cuh.
#pragma once

#include "core/base.h"
#include "device.h"

namespace strobe::ptx {

inline float ex2(float x) { return std::exp2(x); }
inline float lg2(float x) { return std::log2(x); }
inline float rcp(float x) { return 1.f / x; }
inline u32 low_bits(i32 n) { return n <= 0 ? 0u : n >= 32 ? ~0u : (1u << n) - 1; }

// bfloat16 alone: the kernels differ in nothing else between the types.
inline float widen(u16 x) { return __builtin_bit_cast(float, u32(x) << 16); }
inline u16 narrow(float x) {
  const u32 bits = __builtin_bit_cast(u32, x);
  if (x != x) return 0x7fff;
  return u16((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
template <DType kType>
u32 cvt_pair(float low, float high) {
  static_assert(kType == DType::bf16);
  return u32(narrow(low)) | u32(narrow(high)) << 16;
}

}  // namespace strobe::ptx
