// Which tiles of the Hopper forward exist, per head dims: the first row that fits is taken. A row may change speed,
// never results.
#pragma once

#include <numeric>

#include "core/config_sm90.h"

namespace strobe::host {

// How many keys a warpgroup's rows see: those of a window and as many as there are tokens; or different ones without
// such a bound; or all of them the same ones.
constexpr i64 kSomeKeys = i64(1) << 30, kEveryKey = kSomeKeys + 1;

struct FwdSm90Tune {
  int max_rows;            // query rows (packed with heads), where there are few
  int max_dim, max_dim_v;  // head_dim and head_dim_v, rounded up to 16
  i64 max_span;            // for spans up to this one, or for kEveryKey alone; kSomeKeys: for all
  int block_m, block_n, stages, pingpong;
  int stages_q;
};

constexpr int kAnyRows = 1 << 30;

// clang-format off
constexpr FwdSm90Tune kFwdSm90Tune[] = {
    // One consumer: the memory's rate matters, not the tensor cores. It is best with 64 KB on their way to each
    // multiprocessor; 160 KB were a tenth slower.
    {64,  64,  64, kSomeKeys,  64, 128, 2, 0, 1},
    {64, 128, 128, kSomeKeys,  64,  64, 2, 0, 1},
    {64, 192, 192, kSomeKeys,  64,  48, 2, 0, 1},
    {64, 256, 256, kSomeKeys,  64,  32, 2, 0, 1},
    // Windows: more of a wide tile would lie outside of them. Turns cost more than they bring beside few tiles.
    {kAnyRows,  64,  64,  160, 192,  48, 3, 0, 2},
    {kAnyRows,  64,  64,  384, 192,  64, 3, 0, 2},
    {kAnyRows,  64,  64,  768, 192,  96, 3, 1, 2},
    {kAnyRows, 128, 128,  160, 192,  48, 4, 1, 2},
    {kAnyRows, 128, 128,  384, 192,  64, 3, 0, 2},
    {kAnyRows,  64,  64, kSomeKeys, 192, 128, 3, 1, 2},
    // 1024 rows are 5.3 tiles of 192. Beside a head_dim of 128, one stage of Q was faster there.
    {    1024,  96,  96, kEveryKey, 128, 176, 2, 1, 1},
    {kAnyRows,  96,  96, kSomeKeys, 192, 112, 2, 1, 2},
    {    1024,  64, 128, kSomeKeys, 128, 128, 2, 1, 2},
    {    1024, 128, 128, kSomeKeys, 128, 128, 2, 1, 1},
    {kAnyRows,  64, 128, kSomeKeys, 192,  80, 2, 1, 2},
    {kAnyRows, 128, 128, kSomeKeys, 192,  80, 3, 1, 2},
    {    1024, 192, 128, kSomeKeys, 128, 128, 2, 1, 1},
    {kAnyRows, 192, 128, kSomeKeys, 192,  80, 2, 1, 1},
    // Pages.
    {kAnyRows, 128, 128, kEveryKey, 128, 176, 2, 1, 1},
    {kAnyRows, 128, 128, kSomeKeys, 128, 128, 2, 1, 1},
    {kAnyRows, 192, 128, kSomeKeys, 128, 128, 2, 0, 1},
    {kAnyRows, 256, 128, kSomeKeys, 128,  96, 2, 0, 1},
    {kAnyRows, 192, 192, kSomeKeys, 128, 112, 2, 0, 1},
    {kAnyRows, 128, 256, kSomeKeys, 128,  80, 2, 0, 1},
    {kAnyRows, 256, 256, kSomeKeys, 128,  64, 2, 1, 1},
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
constexpr bool tune_forward_sm90(FwdSm90Config& c, i64 rows, i64 span, i64 smem_per_block) {
  for (const FwdSm90Tune& row : kFwdSm90Tune) {
    if (rows > row.max_rows || round_up_16(c.head_dim) > row.max_dim || round_up_16(c.head_dim_v) > row.max_dim_v ||
        (row.max_span == kEveryKey ? span != kEveryKey : row.max_span < kSomeKeys && span > row.max_span))
      continue;
    if (c.paged && row.block_m == 192) continue;  // beside three consumers, a producer of pages has too few registers
    if (set_tile(c, row, smem_per_block)) return true;
  }
  return false;
}

}  // namespace strobe::host
