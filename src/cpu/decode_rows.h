// The inner loops of decoding: dot products of few query rows with key rows, and sums of value rows, read in place
// while the rows after them are prefetched. Each takes 1, 2 or 4 query rows at once.
#pragma once

#include "pack.h"

namespace strobe::cpu::STROBE_ISA {

// Lane n of the result is the sum of x[n]: each round adds two halves of every segment and packs two vectors into one.
STROBE_INLINE vf reduce_each(vf (&x)[kLanes]) {
#pragma GCC unroll 4
  for (int w = kLanes / 2; w; w /= 2) {
    vi low, high;
#pragma GCC unroll 16
    for (int n = 0; n < kLanes; ++n) {
      low[n] = n & w ? n - w + kLanes : n;
      high[n] = n & w ? n + kLanes : n + w;
    }
#pragma GCC unroll 8
    for (int n = 0; n < w; ++n) x[n] = shuffle(x[n], x[n + w], low) + shuffle(x[n], x[n + w], high);
  }
  return x[0];
}

// kLanes * kPair<E> elements as dot_step() takes them; of the first `left` only where there are fewer.
template <class E, class T>
STROBE_INLINE vf load_dot(const T* p) {
  if constexpr (kPair<E> == 2)
    return load(reinterpret_cast<const float*>(p));
  else
    return load(p);
}
template <class E, class T>
STROBE_INLINE vf load_dot(const T* p, i64 left) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  const u32 mask = (u32(1) << left) - 1;
  if constexpr (kPair<E> == 2) return vf(_mm512_maskz_loadu_epi16(mask, p));
  if constexpr (sizeof(T) == 4) return _mm512_maskz_loadu_ps(__mmask16(mask), p);
  if constexpr (__is_same(T, f16)) return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(__mmask16(mask), p));
  return vf(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(__mmask16(mask), p)), 16));
#else
  return load_units<E>(p, ceil_div(left, kPair<E>), left);
#endif
}
template <class E>
STROBE_INLINE vf dot_step(vf c, vf a, vf b) {
#if defined(STROBE_HAS_BF16)
  if constexpr (kPair<E> == 2) return _mm512_dpbf16_ps(c, __m512bh(a), __m512bh(b));
#endif
  return fma(a, b, c);
}

// Prefetches rows line by line, between the reads of earlier rows, in the order of their addresses. A row consists of
// spans of equal size: one per head, or one in all where heads lie beside one another.
struct Fetcher {
  const char* const* rows;
  i64 n_rows;
  const i64* spans;  // byte offsets
  i64 n_spans, bytes;
  i64 row = 0, span = 0;
  const char *at = nullptr, *end = nullptr;

  STROBE_INLINE void fetch(i64 lines) {
    for (; lines > 0; --lines, at += 64) {
      if (at >= end) {
        if (row >= n_rows) return;
        at = rows[row] + spans[span];
        end = at + bytes;
        if (++span == n_spans) span = 0, ++row;
      }
      __builtin_prefetch(at, 0, 2);
    }
  }
};

// s[r][n] = q[r] . (k[n] + offset) for kRows rows and kLanes / kRows keys. q is padded with zeros to whole vectors.
template <int kRows, class E, class T>
STROBE_INLINE void dot_block(const E* q, i64 ldq, const T* const* k, i64 offset, i64 d, float* s, i64 lds,
                             Fetcher* ahead) {
  constexpr int kKeys = kLanes / kRows;
  constexpr i64 kWidth = kLanes * kPair<E>;
  vf acc[kLanes];
#pragma GCC unroll 16
  for (int n = 0; n < kLanes; ++n) acc[n] = vf{};
  const auto step = [&](i64 c, auto load_key) __attribute__((always_inline)) {
    if (ahead) ahead->fetch(kKeys);
    vf row[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) row[r] = load_dot<E>(q + r * ldq + c);
#pragma GCC unroll 16
    for (int n = 0; n < kKeys; ++n) {
      const vf key = load_key(k[n] + offset + c);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) acc[r * kKeys + n] = dot_step<E>(acc[r * kKeys + n], row[r], key);
    }
  };
  i64 c = 0;
  for (; c + kWidth <= d; c += kWidth)
    step(c, [](const T* p) __attribute__((always_inline)) { return load_dot<E>(p); });
  if (c < d) step(c, [&](const T* p) __attribute__((always_inline)) { return load_dot<E>(p, d - c); });
  float sums[kLanes];
  store(sums, reduce_each(acc));
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) __builtin_memcpy(s + r * lds, sums + r * kKeys, kKeys * sizeof(float));
}

// Two vectors of 2 * kLanes values in an order of their own, which order() puts right: of bf16, those at even and at
// odd places, which no shuffle has to widen.
template <class T>
STROBE_INLINE void load_two(const T* p, vf& a, vf& b) {
  if constexpr (__is_same(T, bf16)) {
    const vu both = vu(load(reinterpret_cast<const float*>(p)));
    a = vf(both << 16);
    b = vf(both & 0xFFFF0000u);
  } else {
    a = load(p);
    b = load(p + kLanes);
  }
}
// From memory order to that of load_two(), or back.
template <class T, bool kBack>
STROBE_INLINE void order(vf& a, vf& b) {
  if constexpr (__is_same(T, bf16)) {
    vi low, high;
#pragma GCC unroll 16
    for (int n = 0; n < kLanes; ++n) {
      low[n] = kBack ? n / 2 + n % 2 * kLanes : 2 * n;
      high[n] = kBack ? (n + kLanes) / 2 + n % 2 * kLanes : 2 * n + 1;
    }
    const vf x = shuffle(a, b, low), y = shuffle(a, b, high);
    a = x;
    b = y;
  }
}

// o[r] = o[r] * factor[r] + sum over n keys of p[r][j] * (v[j] + offset), for 2 * kPairs vectors of columns.
template <int kRows, int kPairs, class T>
STROBE_INLINE void add_values(const float* p, i64 ldp, const T* const* v, i64 n, i64 offset, const float* factor,
                              float* o, i64 ldo, Fetcher* ahead) {
  constexpr i64 kLines = max<i64>(1, 2 * kPairs * kLanes * i64(sizeof(T)) / 64);
  vf acc[kRows][2 * kPairs];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int x = 0; x < 2 * kPairs; x += 2) {
      acc[r][x] = load(o + r * ldo + x * kLanes) * factor[r];
      acc[r][x + 1] = load(o + r * ldo + (x + 1) * kLanes) * factor[r];
      order<T, false>(acc[r][x], acc[r][x + 1]);
    }
  for (i64 j = 0; j < n; ++j) {
    if (ahead) ahead->fetch(kLines);
    const T* row = v[j] + offset;
    vf weight[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) weight[r] = broadcast(p[r * ldp + j]);
#pragma GCC unroll 4
    for (int x = 0; x < 2 * kPairs; x += 2) {
      vf a, b;
      load_two(row + x * kLanes, a, b);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        acc[r][x] = fma(weight[r], a, acc[r][x]);
        acc[r][x + 1] = fma(weight[r], b, acc[r][x + 1]);
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int x = 0; x < 2 * kPairs; x += 2) {
      order<T, true>(acc[r][x], acc[r][x + 1]);
      store(o + r * ldo + x * kLanes, acc[r][x]);
      store(o + r * ldo + (x + 1) * kLanes, acc[r][x + 1]);
    }
}

// The same for `cols` columns of one vector.
template <int kRows, class T>
STROBE_INLINE void add_last_values(const float* p, i64 ldp, const T* const* v, i64 n, i64 offset, i64 cols,
                                   const float* factor, float* o, i64 ldo) {
  vf acc[kRows];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) acc[r] = load(o + r * ldo) * factor[r];
  for (i64 j = 0; j < n; ++j) {
    const T* row = v[j] + offset;
    const vf value = cols < kLanes ? load_dot<float>(row, cols) : load(row);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) acc[r] = fma(broadcast(p[r * ldp + j]), value, acc[r]);
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) store(o + r * ldo, acc[r]);
}

template <int kRows, class T>
void add_values_rows(const float* p, i64 ldp, const T* const* v, i64 n, i64 offset, i64 dv, const float* factor,
                     float* o, i64 ldo, Fetcher* ahead) {
  // Accumulators fit the registers with a row of V beside them.
  constexpr int kPairs = kLanes == 16 ? (kRows == 4 ? 2 : 4) : (kRows == 4 ? 1 : 2);
  constexpr i64 kWide = 2 * kPairs * kLanes;
  i64 c = 0;
  for (; c + kWide <= dv; c += kWide) add_values<kRows, kPairs>(p, ldp, v, n, offset + c, factor, o + c, ldo, ahead);
  for (; c + 2 * kLanes <= dv; c += 2 * kLanes)
    add_values<kRows, 1>(p, ldp, v, n, offset + c, factor, o + c, ldo, ahead);
  for (; c < dv; c += kLanes) add_last_values<kRows>(p, ldp, v, n, offset + c, dv - c, factor, o + c, ldo);
}

// Calls f(first_row, kRows as a constant) in chunks of 4, 2 and 1 rows.
template <int kRows>
struct RowCount {
  static constexpr int value = kRows;
};
template <class F>
STROBE_INLINE void for_row_chunks(i64 rows, F f) {
  constexpr int kMost = kLanes < 4 ? kLanes : 4;
  i64 r = 0;
  for (; r + kMost <= rows; r += kMost) f(r, RowCount<kMost>());
  for (; r + 2 <= rows; r += 2) f(r, RowCount<2>());
  for (; r < rows; ++r) f(r, RowCount<1>());
}

}  // namespace strobe::cpu::STROBE_ISA
