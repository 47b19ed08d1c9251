// Parameter blocks of the forward kernels: the call's parameters and what the Plan added.
#pragma once

#include "config.h"
#include "params.h"

namespace strobe {

// Division by a run-time constant: for n < 2^31, n / divisor = (mulhi(n, magic) + n) >> shift (Granlund and Montgomery,
// PLDI 1994).
struct FastDivisor {
  u32 divisor = 1, magic = 1, shift = 0;

  STROBE_HD static FastDivisor of(u32 divisor) {
    FastDivisor d;
    d.divisor = divisor;
    while ((u64(1) << d.shift) < divisor) ++d.shift;
    d.magic = u32(((u64(1) << 32) * ((u64(1) << d.shift) - divisor)) / divisor + 1);
    return d;
  }
  STROBE_HD u32 quotient(u32 n) const { return (u32((u64(n) * magic) >> 32) + n) >> shift; }
  // The remainder; n becomes the quotient.
  STROBE_HD u32 take(u32& n) const {
    const u32 q = quotient(n), rest = n - q * divisor;
    n = q;
    return rest;
  }
};

struct FwdLaunch {
  AttnParams p;
  float* partial_out;    // [num_splits, num_heads, total_q, head_dim_v], null without split
  float* partial_state;  // [num_splits, num_heads, total_q, 2]: maximum and sum
  float log2_scale;      // scale * log2(e)
  FastDivisor page;      // page_size
  FastDivisor group;     // query heads that share a tile
  // blockIdx.x counts row blocks first, then slices of V, splits, groups of heads and sequences.
  FastDivisor m_blocks, slices, splits, groups;
  FastDivisor heads_per_k, heads_per_v;  // num_heads / num_heads_k, num_heads / num_heads_v
};

struct CombineLaunch {
  AttnParams p;
  const float* partial_out;
  const float* partial_state;
  i32 num_splits;
  FastDivisor rows, heads;  // units are counted first, then heads and sequences

  // What a block, or of few parts a warp, merges of each head and sequence: rows, or their groups.
  STROBE_HD static i64 units(const AttnParams& p, i64 num_splits) {
    return ceil_div<i64>(p.seqlen_q, min(rows_of_block(num_splits), kCombineRows));
  }
  STROBE_HD static CombineLaunch of(const AttnParams& p, const float* out, const float* state, i32 num_splits) {
    const u32 rows = u32(units(p, num_splits));
    return {p, out, state, num_splits, FastDivisor::of(rows), FastDivisor::of(u32(p.num_heads))};
  }
};

struct AppendLaunch {
  KVCacheParams c;
  void* q;  // turned queries [batch, seqlen_q, num_heads, head_dim], null without rotary
};

}  // namespace strobe
