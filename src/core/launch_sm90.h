// Parameter block of the Hopper forward kernel.
#pragma once

#include "launch.h"

namespace strobe {

// The driver's CUtensorMap: opaque, made by cuTensorMapEncodeTiled.
struct alignas(64) TensorMap {
  u64 opaque[16];
};

struct FwdSm90Launch {
  // Of q, k and v: (columns, rows, panels of 64 columns, heads, batch).
  TensorMap q, k, v;
  AttnParams p;
  u32* counter;          // next tile, 0 before the launch; null: each block takes every gridDim.x-th tile
  FastDivisor m_blocks;  // fixed lengths: row blocks of a sequence; packed: unused
  FastDivisor heads;     // num_heads
  FastDivisor heads_per_k, heads_per_v;
  // Fixed lengths: the longest row blocks of `section` heads come first, so that the last tiles are short and K and V
  // of a section stay in L2. 0: row block by row block.
  FastDivisor section;
  i32 tiles;         // fixed lengths: all of them
  i32 last_section;  // heads in the last section
  i32 k_rows;        // rows that the tensor of keys has for a sequence (packed: in all)
};

}  // namespace strobe
