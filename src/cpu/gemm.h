// C (+)= A B with fp32 accumulation, in register tiles of kTileRows rows and kTileVectors vectors.
#pragma once

#include "pack.h"

namespace strobe::cpu::STROBE_ISA {

// Accumulators plus one row of B must fit the registers.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTileRows = 6, kTileVectors = 4;
#else
constexpr int kTileRows = 6, kTileVectors = 2;
#endif

STROBE_INLINE vf multiply_add(vf c, const float* a, vf b) { return fma(broadcast(*a), b, c); }
#if defined(STROBE_HAS_BF16)
STROBE_INLINE vf multiply_add(vf c, const bf16* a, vf b) {
  i32 pair;
  __builtin_memcpy(&pair, a, sizeof pair);
  return _mm512_dpbf16_ps(c, __m512bh(_mm512_set1_epi32(pair)), __m512bh(b));
}
#endif

template <int kRows, int kVectors, class E>
STROBE_INLINE void gemm_tile(i64 K, const E* A, i64 lda, const E* B, i64 ldb, float* C, i64 ldc, bool accumulate) {
  vf c[kRows][kVectors];
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < kVectors; ++n) c[m][n] = accumulate ? load(C + m * ldc + n * kLanes) : zero();
  const float* b = reinterpret_cast<const float*>(B);
  for (i64 k = 0; k < K; k += kPair<E>, b += ldb) {
    vf row[kVectors];
#pragma GCC unroll 4
    for (int n = 0; n < kVectors; ++n) row[n] = load(b + n * kLanes);
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 4
      for (int n = 0; n < kVectors; ++n) c[m][n] = multiply_add(c[m][n], A + m * lda + k, row[n]);
  }
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < kVectors; ++n) store(C + m * ldc + n * kLanes, c[m][n]);
}

template <int kVectors, class E>
void gemm_panel(i64 M, i64 K, const E* A, i64 lda, const E* B, i64 ldb, float* C, i64 ldc, bool accumulate) {
  i64 m = 0;
  for (; m + kTileRows <= M; m += kTileRows)
    gemm_tile<kTileRows, kVectors>(K, A + m * lda, lda, B, ldb, C + m * ldc, ldc, accumulate);
  A += m * lda;
  C += m * ldc;
  switch (M - m) {
    case 5:
      return gemm_tile<5, kVectors>(K, A, lda, B, ldb, C, ldc, accumulate);
    case 4:
      return gemm_tile<4, kVectors>(K, A, lda, B, ldb, C, ldc, accumulate);
    case 3:
      return gemm_tile<3, kVectors>(K, A, lda, B, ldb, C, ldc, accumulate);
    case 2:
      return gemm_tile<2, kVectors>(K, A, lda, B, ldb, C, ldc, accumulate);
    case 1:
      return gemm_tile<1, kVectors>(K, A, lda, B, ldb, C, ldc, accumulate);
    default:
      return;
  }
}

// C [M x N] (+)= A [M x K] B [K x N]. N is a multiple of kLanes, K of kPair<E>; ldb counts columns, pairs or not
// (pack.h).
template <class E>
void gemm(i64 M, i64 N, i64 K, const E* A, i64 lda, const E* B, i64 ldb, float* C, i64 ldc, bool accumulate) {
  i64 n = 0;
  for (; n + kTileVectors * kLanes <= N; n += kTileVectors * kLanes)
    gemm_panel<kTileVectors>(M, K, A, lda, B + n * kPair<E>, ldb, C + n, ldc, accumulate);
  B += n * kPair<E>;
  C += n;
  switch ((N - n) / kLanes) {
    case 3:
      return gemm_panel<3>(M, K, A, lda, B, ldb, C, ldc, accumulate);
    case 2:
      return gemm_panel<2>(M, K, A, lda, B, ldb, C, ldc, accumulate);
    case 1:
      return gemm_panel<1>(M, K, A, lda, B, ldb, C, ldc, accumulate);
    default:
      return;
  }
}

}  // namespace strobe::cpu::STROBE_ISA
