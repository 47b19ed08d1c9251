// The cache half of decoding: new keys and values go into the cache in place, keys turned by rotary position (RoFormer,
// arXiv 2104.09864), and q is turned into the workspace. One warp per row of one head.
#pragma once

#include "core/config.h"
#include "core/launch.h"
#include "core/seqlen.h"
#include "cuda/ptx/mma.cuh"

namespace strobe {

template <DType kType>
__device__ __forceinline__ u16 to_element(float x) {
  return u16(ptx::cvt_pair<kType>(x, 0.f));
}

// Copies a row, its first rotary_dim columns turned as at `position`.
template <DType kType>
__device__ __forceinline__ void turn_row(const KVCacheParams& c, const u16* from, u16* to, i64 dim, i64 rotary_dim,
                                         i64 position) {
  const int lane = int(threadIdx.x % 32);
  const i64 half = rotary_dim / 2, table = max<i64>(0, min(position, c.seqlen_ro - 1)) * half;
  const u16* const cos = static_cast<const u16*>(c.rotary_cos) + table;
  const u16* const sin = static_cast<const u16*>(c.rotary_sin) + table;
  for (i64 x = lane; x < half; x += 32) {
    const i64 first = c.rotary_interleaved ? 2 * x : x, second = c.rotary_interleaved ? 2 * x + 1 : x + half;
    const float a = ptx::cvt_f32<kType>(from[first]), b = ptx::cvt_f32<kType>(from[second]);
    const float cx = ptx::cvt_f32<kType>(cos[x]), sx = ptx::cvt_f32<kType>(sin[x]);
    to[first] = to_element<kType>(a * cx - b * sx);
    to[second] = to_element<kType>(b * cx + a * sx);
  }
  for (i64 x = half * 2 + lane; x < dim; x += 32) to[x] = from[x];
}

template <AppendConfig C>
__global__ __launch_bounds__(threads(C)) void append_kv(const __grid_constant__ AppendLaunch launch) {
  static_assert(valid(C));
  constexpr DType kType = DType(C.dtype);
  const KVCacheParams& c = launch.c;
  AttnParams p = c.fwd;
  p.leftpad_k = nullptr;  // positions count from the start of the cache, padding included
  u32 row = blockIdx.x * u32(threads(C) / 32) + threadIdx.x / 32;

  const u32 batch = u32(p.batch), added = c.k_new.data ? u32(p.seqlen_new) : 0u;
  const u32 heads_k = u32(p.num_heads_k), heads_v = u32(p.num_heads_v), heads = u32(p.num_heads);
  const u32 new_rows = added * (heads_k + heads_v), q_rows = launch.q ? u32(p.seqlen_q) * heads : 0u;
  if (row >= batch * (new_rows + q_rows)) return;
  const bool appends = row < batch * new_rows;
  if (!appends) row -= batch * new_rows;
  const u32 rows = appends ? new_rows : q_rows, b = row / rows;
  row %= rows;
  const SeqInfo seq = SeqInfo::of(p, b);
  const i64 before = p.seqused_k ? p.seqused_k[b] : p.seqlen_k;

  if (!appends) {
    const u32 i = row / heads, h = row % heads;
    // Rows are turned by their own position under a causal mask or a window, else all by the cache's length.
    const bool per_row = p.causal || p.window_left >= 0 || p.window_right >= 0;
    const u16* from = static_cast<const u16*>(p.q.data) + seq.q_index(p.q, i, h);
    u16* to = static_cast<u16*>(launch.q) + ((i64(b) * p.seqlen_q + i) * heads + h) * p.head_dim;
    return turn_row<kType>(c, from, to, p.head_dim, c.rotary_dim, before + (per_row ? i : 0));
  }
  const u32 i = row / (heads_k + heads_v), h = row % (heads_k + heads_v);
  const i64 j = before + i;
  if (j < 0 || j >= seq.rows_k) return;  // a length that is not one must not write outside the cache
  if (h < heads_k) {
    const u16* from = static_cast<const u16*>(c.k_new.data) + b * c.k_new.batch_stride + i * c.k_new.row_stride +
                      h * c.k_new.head_stride;
    turn_row<kType>(c, from, static_cast<u16*>(p.k.data) + seq.k_index(p.k, j, h), p.head_dim, c.rotary_dim, j);
  } else {
    const u32 hv = h - heads_k;
    const u16* from = static_cast<const u16*>(c.v_new.data) + b * c.v_new.batch_stride + i * c.v_new.row_stride +
                      hv * c.v_new.head_stride;
    turn_row<kType>(c, from, static_cast<u16*>(p.v.data) + seq.k_index(p.v, j, hv), p.head_dim_v, 0, j);
  }
}

}  // namespace strobe
