// The few words that every engine shares. Freestanding: g++, clang, nvcc and NVRTC compile it without any other header.
#pragma once

#if defined(__CUDACC__)
#define STROBE_HD __host__ __device__ __forceinline__
#else
#define STROBE_HD inline
#endif

namespace strobe {

using i32 = int;
using i64 = long long;
using u32 = unsigned int;
using u64 = unsigned long long;
using u16 = unsigned short;
using u8 = unsigned char;

// What <cmath> has, for compilers that have no headers: NVRTC declares the functions, the others their builtins.
#if defined(__CUDACC_RTC__)
STROBE_HD float exp_f32(float x) { return expf(x); }
STROBE_HD float log_f32(float x) { return logf(x); }
STROBE_HD float tanh_f32(float x) { return tanhf(x); }
#else
STROBE_HD float exp_f32(float x) { return __builtin_expf(x); }
STROBE_HD float log_f32(float x) { return __builtin_logf(x); }
STROBE_HD float tanh_f32(float x) { return __builtin_tanhf(x); }
#endif

constexpr float kLog2e = 1.44269504088896340736f, kLn2 = 0.69314718055994530942f;

// Larger than any length, small enough that sums of a few of them do not overflow.
constexpr i64 kUnbounded = i64(1) << 60;
constexpr i32 kUnbounded32 = 1 << 29;  // among 32-bit lengths, which stay below it

enum class DType : i32 { f32 = 1, f16 = 2, bf16 = 3 };

template <class T>
STROBE_HD constexpr T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
STROBE_HD constexpr T max(T a, T b) {
  return a < b ? b : a;
}
template <class T>
STROBE_HD constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}
STROBE_HD constexpr int round_up_16(int n) { return (n + 15) / 16 * 16; }

}  // namespace strobe
