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

template <DType kType>
void mma_m16n8k16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  // Lane 4 i + j holds rows i and i + 8 of a, column i of b, and of both elements 2 j, 2 j + 1, 2 j + 8, 2 j + 9.
  u64 left[2][emulator::kWarp], right[emulator::kWarp];
  for (int half = 0; half < 2; ++half)
    std::memcpy(left[half], emulator::block->exchange(a[half * 2] | u64(a[half * 2 + 1]) << 32), sizeof left[half]);
  std::memcpy(right, emulator::block->exchange(b0 | u64(b1) << 32), sizeof right);
  const unsigned lane = emulator::lane();
  for (unsigned e = 0; e < 4; ++e)
    for (unsigned k = 0; k < 16; ++k) {
      const unsigned half = k / 8, quad = k % 8 / 2, shift = k % 2 * 16;
      const u64 x = left[half][lane / 4 * 4 + quad] >> e / 2 * 32,
                y = right[(lane % 4 * 2 + e % 2) * 4 + quad] >> half * 32;
      d[e] += widen(u16(x >> shift)) * widen(u16(y >> shift));
    }
}

}  // namespace strobe::ptx
