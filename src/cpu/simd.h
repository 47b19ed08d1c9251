// Vectors of floats as wide as the instruction set at hand, and conversions from and to f16 and bf16.
// Everything lives in a namespace per instruction set: the same inline function built with different flags must not be
// merged by the linker.
#pragma once

#if defined(__AVX2__) || defined(__AVX512F__)
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // g++ 12 warns of its own intrinsics (GCC bug 105593)
#endif
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "core/base.h"

#define STROBE_INLINE inline __attribute__((always_inline))

namespace strobe::cpu::STROBE_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

#if defined(__AVX512BF16__)
#define STROBE_HAS_BF16 1
#endif

typedef float vf __attribute__((vector_size(kLanes * 4)));
typedef i32 vi __attribute__((vector_size(kLanes * 4)));
typedef u32 vu __attribute__((vector_size(kLanes * 4)));
typedef u16 vh __attribute__((vector_size(kLanes * 2)));
// bf16 pairs are loaded as floats, too: hence 2.
typedef float vf_unaligned __attribute__((vector_size(kLanes * 4), aligned(2), may_alias));
typedef u16 vh_unaligned __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));

using strobe::max;
using strobe::min;

struct f16 {
  u16 bits;
};
struct bf16 {
  u16 bits;
};

STROBE_INLINE i64 round_up(i64 n, i64 multiple) { return (n + multiple - 1) / multiple * multiple; }

STROBE_INLINE vf load(const float* p) { return *reinterpret_cast<const vf_unaligned*>(p); }
STROBE_INLINE void store(float* p, vf x) { *reinterpret_cast<vf_unaligned*>(p) = x; }
STROBE_INLINE vf broadcast(float x) { return x - vf{}; }
STROBE_INLINE vf zero() { return vf{}; }
STROBE_INLINE vf max(vf a, vf b) { return a > b ? a : b; }
STROBE_INLINE vf min(vf a, vf b) { return a < b ? a : b; }
STROBE_INLINE vf select(vi mask, vf a, vf b) { return mask ? a : b; }

// Lane n is lane index[n] of a and b put together; index is a constant.
STROBE_INLINE vf shuffle(vf a, vf b, vi index) {
#if defined(__clang__)
  vf x;
  for (int n = 0; n < kLanes; ++n) x[n] = index[n] < kLanes ? a[index[n]] : b[index[n] - kLanes];
  return x;
#else
  return __builtin_shuffle(a, b, index);
#endif
}

STROBE_INLINE vf fma(vf a, vf b, vf c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
  return vfmaq_f32(c, a, b);
#else
  return a * b + c;
#endif
}

STROBE_INLINE float reduce_max(vf x) {
  float m = x[0];
  for (int n = 1; n < kLanes; ++n) m = x[n] > m ? x[n] : m;
  return m;
}
STROBE_INLINE float reduce_add(vf x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(x);
#else
  float part[kLanes];
  store(part, x);
  for (int step = kLanes / 2; step; step /= 2)
    for (int n = 0; n < step; ++n) part[n] += part[n + step];
  return part[0];
#endif
}

// One float.
STROBE_INLINE float widen(float x) { return x; }
STROBE_INLINE float widen(bf16 x) { return __builtin_bit_cast(float, u32(x.bits) << 16); }
STROBE_INLINE float widen(f16 x) {
  const u32 magnitude = u32(x.bits & 0x7FFFu) << 13;
  // 2^112 moves f16's exponent bias to f32's, subnormals included.
  u32 bits = __builtin_bit_cast(u32, __builtin_bit_cast(float, magnitude) * 0x1p112f);
  if (magnitude >= 0x7C00u << 13) bits |= 0x7F800000u;
  return __builtin_bit_cast(float, bits | u32(x.bits & 0x8000u) << 16);
}
STROBE_INLINE void narrow(float& to, float x) { to = x; }
STROBE_INLINE void narrow(bf16& to, float x) {
  const u32 bits = __builtin_bit_cast(u32, x);
  to.bits = x != x ? u16(bits >> 16 | 0x40) : u16((bits + 0x7FFFu + (bits >> 16 & 1)) >> 16);
}
STROBE_INLINE void narrow(f16& to, float x) {
  const u32 bits = __builtin_bit_cast(u32, x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
  u32 half;
  if (magnitude > 0x7F800000u) {
    half = 0x7E00u;
  } else if (magnitude >= 0x477FF000u) {  // rounds beyond 65504
    half = 0x7C00u;
  } else if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 leaves the rounded bits at the bottom
    half = __builtin_bit_cast(u32, __builtin_bit_cast(float, magnitude) + 0.5f) - 0x3F000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xFFFu + (magnitude >> 13 & 1)) >> 13;
  }
  to.bits = u16(sign | half);
}

// A vector of them.
STROBE_INLINE vf load(const bf16* p) {
#if defined(__AVX512F__)
  return vf(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
#elif defined(__AVX2__)
  return vf(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
#else
  const vh half = *reinterpret_cast<const vh_unaligned*>(p);
  return vf(__builtin_convertvector(half, vu) << 16);
#endif
}
STROBE_INLINE vf load(const f16* p) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(__aarch64__)
  return vcvt_f32_f16(vld1_f16(reinterpret_cast<const __fp16*>(p)));
#else
  vf x;
  for (int n = 0; n < kLanes; ++n) x[n] = widen(p[n]);
  return x;
#endif
}
STROBE_INLINE void store(bf16* p, vf x) {
#if defined(STROBE_HAS_BF16)
  const __m256bh half = _mm512_cvtneps_pbh(x);
  __builtin_memcpy(p, &half, sizeof half);
#else
  const vu bits = vu(x);
  const vu rounded = (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
  const vu nan = bits >> 16 | 0x40u;
  *reinterpret_cast<vh_unaligned*>(p) = __builtin_convertvector(x != x ? nan : rounded, vh);
#endif
}
STROBE_INLINE void store(f16* p, vf x) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__aarch64__)
  vst1_f16(reinterpret_cast<__fp16*>(p), vcvt_f16_f32(x));
#else
  for (int n = 0; n < kLanes; ++n) narrow(p[n], x[n]);
#endif
}

// The first n elements only; the rest of the vector is zero, the rest of memory untouched.
template <class T>
STROBE_INLINE vf load_first(const T* p, i64 n) {
  T part[kLanes] = {};
  for (i64 c = 0; c < n; ++c) part[c] = p[c];
  return load(part);
}
template <class T>
STROBE_INLINE void store_first(T* p, vf x, i64 n) {
  T part[kLanes];
  store(part, x);
  for (i64 c = 0; c < n; ++c) p[c] = part[c];
}

}  // namespace strobe::cpu::STROBE_ISA
