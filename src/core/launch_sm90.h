// Parameter block of the Hopper forward kernel.
#pragma once

#include "core/launch.h"

namespace strobe {

// The driver's CUtensorMap: opaque, made by cuTensorMapEncodeTiled.
struct alignas(64) TensorMap {
  u64 opaque[16];
};

struct FwdSm90Launch {
  // Of q, and of out where its rows are staged: (columns, heads, rows, batch); of k and v: (columns, rows, heads, batch
  // or pages).
  TensorMap q, k, v, out;
  AttnParams p;
  float* partial_out;    // as in FwdLaunch
  float* partial_state;  // as in FwdLaunch
  u32* counter;          // tiles dealt out after each block's first, 0 before the launch; null: no block asks
  FastDivisor page;      // page_size
  FastDivisor group;     // query heads that share a tile
  FastDivisor heads_per_k, heads_per_v;  // num_heads / num_heads_k, num_heads / num_heads_v
  // Fixed lengths: tiles count splits first. Then the last row blocks of `section` groups of heads come before any
  // others: the longest tiles first, and K and V of a section stay in L2. Where clusters work, `m_blocks` and `tiles`
  // count pairs of row blocks.
  i32 splits, m_blocks, section;
  i32 groups;     // groups of heads in a sequence
  i32 tiles;      // all of them; packed: unused
  i32 rows_k;     // rows of k and v that a box can reach in a sequence's batch entry
  i32 long_keys;  // packed: sequences with more keys come first; -1: all in their order
};

}  // namespace strobe
