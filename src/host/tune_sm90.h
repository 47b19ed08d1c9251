// Which tiles of the Hopper forward exist, per head dims: the first row that fits is taken. A row may change speed,
// never results.
#pragma once

#include "core/config_sm90.h"

namespace strobe::host {

struct FwdSm90Tune {
  int max_rows;            // query rows (packed with heads), where there are few
  int max_dim, max_dim_v;  // head_dim and head_dim_v, rounded up to 16
  int masked;              // 1: also where rows see different keys, 0: only where every row sees every key
  int block_m, block_n, stages, pingpong;
};

constexpr int kAnyRows = 1 << 30;

// clang-format off
constexpr FwdSm90Tune kFwdSm90Tune[] = {
    // One consumer: bytes on their way matter, not the tensor cores.
    {64,  64,  64, 1,  64, 128, 5, 0},
    {64, 128, 128, 1,  64,  64, 5, 0},
    {64, 192, 192, 1,  64,  64, 3, 0},
    {64, 256, 256, 1,  64,  64, 2, 0},
    {kAnyRows,  64,  64, 0, 192, 128, 2, 1},
    // Short sequences under a mask: 192 rows are mostly masked, or beyond the end.
    {2048,  64,  64, 1, 128, 128, 2, 1},
    {kAnyRows,  64,  64, 1, 192, 128, 2, 1},
    {kAnyRows,  64, 128, 0, 128, 176, 2, 1},
    {kAnyRows, 128, 128, 0, 128, 176, 2, 1},
    {kAnyRows, 128, 128, 1, 128, 128, 2, 1},
    {kAnyRows, 192, 128, 1, 128, 128, 2, 0},
    {kAnyRows, 256, 128, 1, 128,  96, 2, 0},
    {kAnyRows, 192, 192, 1, 128, 112, 2, 0},
    {kAnyRows, 128, 256, 1, 128,  80, 2, 0},
    {kAnyRows, 256, 256, 1, 128,  80, 2, 1},
};
// clang-format on

// False where the tile does not fit.
constexpr bool set_tile(FwdSm90Config& c, const FwdSm90Tune& row, i64 smem_per_block) {
  c.block_m = row.block_m;
  c.block_n = row.block_n;
  c.stages = row.stages;
  c.pingpong = row.pingpong;
  if (c.paged && c.block_n % c.paged != 0) c.paged = 8;  // of any page, a box of 8 rows is a part
  return valid(c) && smem_bytes(c) <= smem_per_block;
}

// Fills the tile of `c`, whose other fields are set. False where no row fits.
constexpr bool tune_forward_sm90(FwdSm90Config& c, i64 rows, bool masked, i64 smem_per_block) {
  for (const FwdSm90Tune& row : kFwdSm90Tune) {
    if (rows > row.max_rows || round_up_16(c.head_dim) > row.max_dim || round_up_16(c.head_dim_v) > row.max_dim_v ||
        (masked && !row.masked))
      continue;
    if (c.paged && row.block_m == 192) continue;  // beside three consumers, a producer of pages has too few registers
    if (set_tile(c, row, smem_per_block)) return true;
  }
  return false;
}

}  // namespace strobe::host
