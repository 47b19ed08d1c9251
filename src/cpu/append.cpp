// Rotary position embedding (RoFormer, arXiv 2104.09864) and the append to the cache: a few rows per call, so plain
// code for every instruction set.
#include "cpu/append.h"

#include <cstring>

#include "core/seqlen.h"

#define STROBE_ISA plain
#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace strobe::cpu {
namespace {

using plain::bf16;
using plain::f16;

// Calls f with a null pointer to the element type.
template <class F>
void with_type(DType dtype, F f) {
  switch (dtype) {
    case DType::f32:
      return f(static_cast<float*>(nullptr));
    case DType::f16:
      return f(static_cast<f16*>(nullptr));
    case DType::bf16:
      return f(static_cast<bf16*>(nullptr));
  }
}

// Pairs are elements (2x, 2x + 1) where interleaved, else (x, x + rotary_dim / 2). The rest of the row is copied.
template <class T>
void rotate(const KVCacheParams& c, const T* from, i64 position, T* to) {
  const i64 half = c.rotary_dim / 2, row = max<i64>(0, min(position, c.seqlen_ro - 1)) * half;
  const T* cos = static_cast<const T*>(c.rotary_cos) + row;
  const T* sin = static_cast<const T*>(c.rotary_sin) + row;
  for (i64 x = 0; x < half; ++x) {
    const i64 a = c.rotary_interleaved ? 2 * x : x, b = c.rotary_interleaved ? 2 * x + 1 : x + half;
    const float fa = plain::widen(from[a]), fb = plain::widen(from[b]);
    const float fc = plain::widen(cos[x]), fs = plain::widen(sin[x]);
    plain::narrow(to[a], fa * fc - fb * fs);
    plain::narrow(to[b], fb * fc + fa * fs);
  }
  std::memcpy(to + c.rotary_dim, from + c.rotary_dim, size_t(c.fwd.head_dim - c.rotary_dim) * sizeof(T));
}

// Keys that sequence b has before this call.
i64 length_before(const AttnParams& p, i64 b) { return p.seqused_k ? p.seqused_k[b] : p.seqlen_k; }

}  // namespace

void append_kv(const KVCacheParams& c, const strobe_executor& executor) {
  AttnParams p = c.fwd;
  p.leftpad_k = nullptr;  // it moves the first visible key, not the rows of the cache
  if (p.seqlen_new == 0) return;
  const double elements = double(p.batch * p.seqlen_new) *
                          double(p.num_heads_k * p.head_dim + p.num_heads_v * p.head_dim_v);
  with_type(p.dtype, [&]<class T>(T*) {
    plain::parallel_items(executor, p.batch * p.seqlen_new, elements, [&](i64 item) {
      const i64 b = item / p.seqlen_new, i = item % p.seqlen_new, row = length_before(p, b) + i;
      const SeqInfo seq = SeqInfo::of(p, b);
      const auto source = [&](const Rows& rows, i64 h) {
        return static_cast<const T*>(rows.data) + b * rows.batch_stride + i * rows.row_stride + h * rows.head_stride;
      };
      for (i64 h = 0; h < p.num_heads_k; ++h) {
        T* to = static_cast<T*>(p.k.data) + seq.k_index(p.k, row, h);
        if (c.rotary_dim > 0)
          rotate(c, source(c.k_new, h), row, to);
        else
          std::memcpy(to, source(c.k_new, h), size_t(p.head_dim) * sizeof(T));
      }
      for (i64 h = 0; h < p.num_heads_v; ++h)
        std::memcpy(static_cast<T*>(p.v.data) + seq.k_index(p.v, row, h), source(c.v_new, h),
                    size_t(p.head_dim_v) * sizeof(T));
    });
  });
}

size_t rotated_q_bytes(const KVCacheParams& c) {
  const AttnParams& p = c.fwd;
  return size_t(p.batch * p.seqlen_q * p.num_heads * p.head_dim) * (p.dtype == DType::f32 ? 4 : 2);
}

Rows rotate_q(const KVCacheParams& c, void* q_out, const strobe_executor& executor) {
  const AttnParams& p = c.fwd;
  const bool per_row = p.causal || p.window_left >= 0 || p.window_right >= 0;
  const Rows out = {q_out, p.seqlen_q * p.num_heads * p.head_dim, p.num_heads * p.head_dim, p.head_dim};
  with_type(p.dtype, [&]<class T>(T*) {
    plain::parallel_items(executor, p.batch * p.seqlen_q, double(rotated_q_bytes(c)), [&](i64 item) {
      const i64 b = item / p.seqlen_q, i = item % p.seqlen_q;
      const SeqInfo seq = SeqInfo::of(p, b);
      for (i64 h = 0; h < p.num_heads; ++h)
        rotate(c, static_cast<const T*>(p.q.data) + seq.q_index(p.q, i, h), length_before(p, b) + (per_row ? i : 0),
               static_cast<T*>(q_out) + seq.q_index(out, i, h));
    });
  });
  return out;
}

}  // namespace strobe::cpu
