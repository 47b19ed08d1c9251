// Rows of a tensor, given by pointers, into the layouts that gemm() reads. f16 and bf16 widen on the way where E is
// float.
//
//   A (M x K):  row-major, dst[m * ld + k]
//   B (K x N):  float: dst[k * ld + n];  bf16: pairs along k, dst[k / 2 * 2 * ld + 2 * n + k % 2]
#pragma once

#include <cstddef>

#include "simd.h"

namespace strobe::cpu::STROBE_ISA {

// B takes this many rows for K of them: pairs where E is bf16.
template <class E>
constexpr i64 kPair = sizeof(E) == 2 ? 2 : 1;

// A operand: n_rows x cols, zero from cols to cols_padded (a multiple of kPair).
template <class E, class T>
void pack_rows(E* dst, i64 ld, const T* const* rows, i64 n_rows, i64 cols, i64 cols_padded) {
  for (i64 r = 0; r < n_rows; ++r) {
    const T* src = rows[r];
    E* to = dst + r * ld;
    if constexpr (sizeof(E) == sizeof(T)) {
      __builtin_memcpy(to, src, size_t(cols) * sizeof(E));
    } else {
      i64 c = 0;
      for (; c + kLanes <= cols; c += kLanes) store(to + c, load(src + c));
      for (; c < cols; ++c) to[c] = widen(src[c]);
    }
    for (i64 c = cols; c < cols_padded; ++c) to[c] = E{};
  }
}

// x[r][c] becomes x[c][r]: each of the log2(kLanes) rounds interleaves row r with row r + kLanes / 2.
STROBE_INLINE void transpose(vf (&x)[kLanes]) {
  vi low, high;
  for (int n = 0; n < kLanes; ++n) {
    low[n] = n / 2 + n % 2 * kLanes;
    high[n] = kLanes / 2 + n / 2 + n % 2 * kLanes;
  }
#pragma GCC unroll 4
  for (int round = 1; round < kLanes; round *= 2) {
    vf y[kLanes];
#pragma GCC unroll 8
    for (int r = 0; r < kLanes / 2; ++r) {
      y[2 * r] = shuffle(x[r], x[r + kLanes / 2], low);
      y[2 * r + 1] = shuffle(x[r], x[r + kLanes / 2], high);
    }
#pragma GCC unroll 16
    for (int r = 0; r < kLanes; ++r) x[r] = y[r];
  }
}

// Loads kLanes 32-bit units: floats, or pairs of bf16 as they are.
template <class E, class T>
STROBE_INLINE vf load_units(const T* p, i64 n_units, i64 cols) {
  if constexpr (kPair<E> == 2) {
    if (cols >= 2 * kLanes) return load(reinterpret_cast<const float*>(p));
    u16 part[2 * kLanes] = {};
    for (i64 c = 0; c < cols; ++c) part[c] = p[c].bits;
    vf x;
    __builtin_memcpy(&x, part, sizeof x);
    return x;
  } else {
    return n_units >= kLanes ? load(p) : load_first(p, n_units);
  }
}

// B operand of the transpose: K = cols (zero up to a multiple of kPair), N = n_rows (zero up to a multiple of kLanes).
template <class E, class T>
void pack_transposed(E* dst, i64 ld, const T* const* rows, i64 n_rows, i64 cols) {
  float* units = reinterpret_cast<float*>(dst);  // a unit is a float or a pair of bf16
  const i64 n_units = ceil_div(cols, kPair<E>);
  for (i64 r = 0; r < n_rows; r += kLanes) {
    for (i64 u = 0; u < n_units; u += kLanes) {
      vf x[kLanes];
#pragma GCC unroll 16
      for (int n = 0; n < kLanes; ++n)
        x[n] = r + n < n_rows ? load_units<E>(rows[r + n] + u * kPair<E>, n_units - u, cols - u * kPair<E>) : zero();
      transpose(x);
      const i64 count = min<i64>(kLanes, n_units - u);
      if (count == kLanes) {
#pragma GCC unroll 16
        for (int n = 0; n < kLanes; ++n) store(units + (u + n) * ld + r, x[n]);
      } else {
        for (i64 n = 0; n < count; ++n) store(units + (u + n) * ld + r, x[n]);
      }
    }
  }
}

// B operand of the rows as they are: K = n_rows (zero up to a multiple of kPair), N = cols (zero up to one of kLanes).
template <class E, class T>
void pack_natural(E* dst, i64 ld, const T* const* rows, i64 n_rows, i64 cols) {
  if constexpr (kPair<E> == 2) {
    float* units = reinterpret_cast<float*>(dst);
    for (i64 r = 0; r < n_rows; r += 2) {
      const bool pair = r + 1 < n_rows;
      float* to = units + r / 2 * ld;
      for (i64 c = 0; c < cols; c += kLanes) {
        const bool whole = c + kLanes <= cols;
        const vf even = whole ? load(rows[r] + c) : load_first(rows[r] + c, cols - c);
        const vf odd = !pair ? zero() : whole ? load(rows[r + 1] + c) : load_first(rows[r + 1] + c, cols - c);
        store(to + c, vf(vu(even) >> 16 | vu(odd)));
      }
    }
  } else {
    for (i64 r = 0; r < n_rows; ++r) {
      i64 c = 0;
      for (; c + kLanes <= cols; c += kLanes) store(dst + r * ld + c, load(rows[r] + c));
      if (c < cols) store(dst + r * ld + c, load_first(rows[r] + c, cols - c));
    }
  }
}

}  // namespace strobe::cpu::STROBE_ISA
