// Which tiles of the Hopper forward exist, per head dims: the first row that fits is taken. A row may change speed,
// never results.
#pragma once

#include <numeric>

#include "core/config_sm90.h"

namespace strobe::host {

// Which keys rows see: all of them the same ones; different ones; those of a window of up to kNarrowKeys keys.
enum Masking { kEveryKey, kSomeKeys, kNarrowWindow };
constexpr i64 kNarrowKeys = 256;

struct FwdSm90Tune {
  int max_rows;            // query rows (packed with heads), where there are few
  int max_dim, max_dim_v;  // head_dim and head_dim_v, rounded up to 16
  int masked;              // for kEveryKey or kNarrowWindow alone, or (kSomeKeys) for all
  int block_m, block_n, stages, pingpong;
  int stages_q;
};

constexpr int kAnyRows = 1 << 30;

// clang-format off
constexpr FwdSm90Tune kFwdSm90Tune[] = {
    // One consumer: the memory's rate matters, not the tensor cores. It is best with 64 KB on their way to each
    // multiprocessor; 160 KB were a tenth slower.
    {64,  64,  64, 1,  64, 128, 2, 0, 1},
    {64, 128, 128, 1,  64,  64, 2, 0, 1},
    {64, 192, 192, 1,  64,  48, 2, 0, 1},
    {64, 256, 256, 1,  64,  32, 2, 0, 1},
    // A narrow window: more of a wide tile would lie outside of it. Turns cost more than they bring there.
    {kAnyRows,  64,  64, 2, 192,  64, 3, 0, 2},
    {kAnyRows,  64,  64, 1, 192, 128, 3, 1, 2},
    // 1024 rows are 5.3 tiles of 192. Beside a head_dim of 128, one stage of Q was faster there.
    {    1024,  96,  96, 0, 128, 176, 2, 1, 1},
    {kAnyRows,  96,  96, 1, 192, 112, 2, 1, 2},
    {    1024,  64, 128, 1, 128, 128, 2, 1, 2},
    {    1024, 128, 128, 1, 128, 128, 2, 1, 1},
    {kAnyRows,  64, 128, 1, 192,  80, 2, 1, 2},
    {kAnyRows, 128, 128, 1, 192,  80, 3, 1, 2},
    // Pages.
    {kAnyRows, 128, 128, 0, 128, 176, 2, 1, 1},
    {kAnyRows, 128, 128, 1, 128, 128, 2, 1, 1},
    {kAnyRows, 192, 128, 1, 128, 128, 2, 0, 1},
    {kAnyRows, 256, 128, 1, 128,  96, 2, 0, 1},
    {kAnyRows, 192, 192, 1, 128, 112, 2, 0, 1},
    {kAnyRows, 128, 256, 1, 128,  80, 2, 0, 1},
    {kAnyRows, 256, 256, 1, 128,  80, 2, 1, 1},
};
// clang-format on

// False where the tile does not fit.
constexpr bool set_tile(FwdSm90Config& c, const FwdSm90Tune& row, i64 smem_per_block) {
  c.block_m = row.block_m;
  c.block_n = row.block_n;
  c.stages = row.stages;
  c.pingpong = row.pingpong;
  if (c.paged) c.paged = std::gcd(c.paged, c.block_n);
  // A second stage of Q has no registers beside a soft cap, and was not timed for packed sequences.
  c.stages_q = c.packed || c.paged || c.softcap ? 1 : row.stages_q;
  return valid(c) && smem_bytes(c) <= smem_per_block;
}

// Fills the tile of `c`, whose other fields are set. False where no row fits.
constexpr bool tune_forward_sm90(FwdSm90Config& c, i64 rows, Masking masking, i64 smem_per_block) {
  for (const FwdSm90Tune& row : kFwdSm90Tune) {
    if (rows > row.max_rows || round_up_16(c.head_dim) > row.max_dim || round_up_16(c.head_dim_v) > row.max_dim_v ||
        (row.masked == kNarrowWindow ? masking != kNarrowWindow : row.masked == kEveryKey && masking != kEveryKey))
      continue;
    if (c.paged && row.block_m == 192) continue;  // beside three consumers, a producer of pages has too few registers
    if (set_tile(c, row, smem_per_block)) return true;
  }
  return false;
}

}  // namespace strobe::host
