#include "cpu/portable/tile.h"

#include <bit>
#include <cmath>
#include <cstring>

#include "core/softmax.h"

// One source, several instruction sets: the loader picks the clone that the machine runs.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__)
#define STROBE_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define STROBE_CLONES
#endif
#define STROBE_INLINE inline __attribute__((always_inline))

namespace strobe::cpu {
namespace {

typedef float Vec __attribute__((vector_size(kLanes * sizeof(float)), aligned(4), may_alias));

// A register tile of kRows x kVectors accumulators.
template <int kRows, int kVectors>
STROBE_INLINE void micro(i64 k_size, const float* a, i64 a_row, i64 a_col, const float* b, i64 ldb, float* c, i64 ldc,
                         bool accumulate) {
  Vec acc[kRows][kVectors] = {};
  for (i64 k = 0; k < k_size; ++k) {
    const float* row = b + k * ldb;
    for (int m = 0; m < kRows; ++m) {
      const Vec x = a[m * a_row + k * a_col] - Vec{};
      for (int n = 0; n < kVectors; ++n) acc[m][n] += x * *reinterpret_cast<const Vec*>(row + n * kLanes);
    }
  }
  for (int m = 0; m < kRows; ++m)
    for (int n = 0; n < kVectors; ++n) {
      Vec* out = reinterpret_cast<Vec*>(c + m * ldc + n * kLanes);
      *out = accumulate ? *out + acc[m][n] : acc[m][n];
    }
}

template <int kVectors>
STROBE_INLINE void panel(i64 m_size, i64 k_size, const float* a, i64 a_row, i64 a_col, const float* b, i64 ldb,
                         float* c, i64 ldc, bool accumulate) {
  i64 m = 0;
  for (; m + 6 <= m_size; m += 6)
    micro<6, kVectors>(k_size, a + m * a_row, a_row, a_col, b, ldb, c + m * ldc, ldc, accumulate);
  for (; m < m_size; ++m) micro<1, kVectors>(k_size, a + m * a_row, a_row, a_col, b, ldb, c + m * ldc, ldc, accumulate);
}

// exp(x) by 2^n * 2^f, f in [-0.5, 0.5], a degree-6 Taylor polynomial of 2^f; loops over it vectorise.
STROBE_INLINE float exp_fast(float x) {
  const float clamped = x < -87.f ? -87.f : x;
  const float y = clamped * 1.44269504f;
  const float n = __builtin_rintf(y);
  const float f = __builtin_fmaf(clamped, 1.44269504f, -n) + clamped * 1.92596299e-8f;
  float poly = 1.54035304e-4f;
  poly = poly * f + 1.33335581e-3f;
  poly = poly * f + 9.61812911e-3f;
  poly = poly * f + 5.55041087e-2f;
  poly = poly * f + 2.40226507e-1f;
  poly = poly * f + 6.93147181e-1f;
  poly = poly * f + 1.f;
  const float power = std::bit_cast<float>((i32(n) + 127) << 23);
  return x < -87.f ? 0.f : poly * power;
}

STROBE_INLINE u16 to_bf16(float value) {
  const u32 bits = std::bit_cast<u32>(value);
  return value != value ? u16(0x7fc0) : u16((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

}  // namespace

STROBE_CLONES void gemm(i64 m_size, i64 n_size, i64 k_size, const float* a, i64 a_row, i64 a_col, const float* b,
                        i64 ldb, float* c, i64 ldc, bool accumulate) {
  i64 n = 0;
  for (; n + 4 * kLanes <= n_size; n += 4 * kLanes)
    panel<4>(m_size, k_size, a, a_row, a_col, b + n, ldb, c + n, ldc, accumulate);
  for (; n < n_size; n += kLanes) panel<1>(m_size, k_size, a, a_row, a_col, b + n, ldb, c + n, ldc, accumulate);
}

STROBE_CLONES void load_rows(DType dtype, const void* const* rows, i64 n_rows, i64 cols, float* out, i64 ld) {
  for (i64 r = 0; r < n_rows; ++r, out += ld) {
    if (dtype == DType::f32) {
      std::memcpy(out, rows[r], sizeof(float) * cols);
    } else if (dtype == DType::bf16) {
      const u16* in = static_cast<const u16*>(rows[r]);
      for (i64 c = 0; c < cols; ++c) out[c] = std::bit_cast<float>(u32(in[c]) << 16);
    } else {
      const _Float16* in = static_cast<const _Float16*>(rows[r]);
      for (i64 c = 0; c < cols; ++c) out[c] = float(in[c]);
    }
    for (i64 c = cols; c < ld; ++c) out[c] = 0.f;
  }
}

STROBE_CLONES void transpose(const float* in, i64 in_ld, i64 n_rows, i64 cols, float* out, i64 ld) {
  for (i64 c = 0; c < cols; ++c) {
    for (i64 r = 0; r < n_rows; ++r) out[c * ld + r] = in[r * in_ld + c];
    for (i64 r = n_rows; r < ld; ++r) out[c * ld + r] = 0.f;
  }
}

STROBE_CLONES void store_row(DType dtype, const float* in, float scale, i64 cols, void* out) {
  if (dtype == DType::f32) {
    for (i64 c = 0; c < cols; ++c) static_cast<float*>(out)[c] = in[c] * scale;
  } else if (dtype == DType::bf16) {
    for (i64 c = 0; c < cols; ++c) static_cast<u16*>(out)[c] = to_bf16(in[c] * scale);
  } else {
    for (i64 c = 0; c < cols; ++c) static_cast<_Float16*>(out)[c] = _Float16(in[c] * scale);
  }
}

STROBE_CLONES void scale_row(float* row, i64 n, float factor) {
  for (i64 c = 0; c < n; ++c) row[c] *= factor;
}

STROBE_CLONES float max_of(const float* row, i64 n) {
  float lane[kLanes];
  for (float& x : lane) x = kNegInfinity;
  i64 c = 0;
  for (; c + kLanes <= n; c += kLanes)
    for (i64 l = 0; l < kLanes; ++l) lane[l] = row[c + l] > lane[l] ? row[c + l] : lane[l];
  float top = kNegInfinity;
  for (float x : lane) top = max(top, x);
  for (; c < n; ++c) top = max(top, row[c]);
  return top;
}

STROBE_CLONES float exp_row(float* row, i64 n, float shift) {
  float lane[kLanes] = {};
  i64 c = 0;
  for (; c + kLanes <= n; c += kLanes)
    for (i64 l = 0; l < kLanes; ++l) lane[l] += row[c + l] = exp_fast(row[c + l] - shift);
  float sum = 0.f;
  for (float x : lane) sum += x;
  for (; c < n; ++c) sum += row[c] = exp_fast(row[c] - shift);
  return sum;
}

float widen(DType dtype, const void* element) {
  float value;
  load_rows(dtype, &element, 1, 1, &value, 1);
  return value;
}

i64 element_size(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

}  // namespace strobe::cpu
