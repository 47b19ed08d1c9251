// Which forward tiles exist, per shared memory and head dims: the first row that fits is taken. A row may change speed,
// never results.
#pragma once

#include "core/config.h"

namespace strobe::host {

struct FwdTune {
  int min_smem;            // shared memory of one block in KiB: 227 on sm_90, 163 on sm_80, 99 on sm_86, 89, 120
  int max_rows;            // query rows (packed with heads), where there are few
  int max_dim, max_dim_v;  // head_dim and columns of V in one block, rounded up to 16
  int block_m, block_n, warps, stages, q_in_registers;
  int plain = 0;  // only without pages, softcap, ALiBi and dropout, which need registers of their own
};

constexpr int kManyRows = 1 << 30;

// clang-format off
constexpr FwdTune kFwdTune[] = {
    // Decoding: four warps divide a tile's keys, and more bytes are on their way than the memory's latency hides.
    {227,  16,  64,  64,  16, 128, 4, 3, 1},
    {227,  16, 128, 128,  16,  64, 4, 3, 1},
    {227,  16, 256, 256,  16,  64, 4, 2, 0},
    { 99,  16, 128, 128,  16,  64, 4, 2, 1},
    { 99,  16, 256, 256,  16,  64, 4, 1, 0},
    { 99,  16, 576, 256,  16,  32, 2, 1, 0},
    {227,  32, 128, 128,  32,  64, 4, 3, 0},
    {163,  32, 256, 256,  32,  64, 4, 1, 0},
    { 99,  32, 128, 128,  32,  64, 4, 2, 0},
    { 99,  32, 576, 256,  32,  32, 2, 1, 0},
    {227,  64, 128, 128,  64,  64, 4, 2, 0},
    // 32 rows a warp while the accumulators of 128 columns fit in registers, else 16.
    { 99, kManyRows,  64,  64, 128,  64, 4, 2, 1},
    {227, kManyRows, 128, 128, 128,  64, 4, 2, 0, 1},
    { 99, kManyRows, 128, 128, 128,  32, 4, 2, 0},
    {227, kManyRows, 192, 128, 128,  48, 4, 2, 0, 1},
    {163, kManyRows, 256, 128, 128,  32, 4, 1, 0},
    { 99, kManyRows, 256, 256,  64,  64, 4, 1, 0},
    {227, kManyRows, 576, 256,  64,  64, 4, 1, 0},
    {163, kManyRows, 576, 256,  64,  32, 4, 1, 0},
    { 99, kManyRows, 576, 256,  32,  32, 2, 1, 0},
};
// clang-format on

// Fills the tile of `c`, whose other fields are set. False where no row fits.
constexpr bool tune_forward(FwdConfig& c, i64 rows, i64 smem_per_block) {
  if (c.head_dim_v > 256 && c.head_dim_v != 512) return false;
  for (const FwdTune& row : kFwdTune) {
    if (smem_per_block < i64(row.min_smem) * 1024 || rows > row.max_rows || round_up_16(c.head_dim) > row.max_dim ||
        round_up_16(value_slice(c)) > row.max_dim_v || (row.plain && (c.paged || c.softcap || c.alibi || c.dropout)))
      continue;
    c.block_m = row.block_m;
    c.block_n = row.block_n;
    c.warps = row.warps;
    c.stages = row.stages;
    c.q_in_registers = row.q_in_registers;
    if (valid(c) && smem_bytes(c) <= smem_per_block) return true;
  }
  return false;
}

}  // namespace strobe::host
