// Which tiles of the Hopper forward exist, per head dims: the first row that fits is taken, and for windows the best. A
// row may change speed, never results.
#pragma once

#include <numeric>

#include "core/config_sm90.h"

namespace strobe::host {

// Which keys rows see: all of them the same ones, different ones, or those of a window. Of a table's row also: keys in
// pages, or in pages that a tile of 64 keys divides, so that one box brings it; all keys, and an even number of row
// blocks, of which two share tiles; all keys, and rows that fill these tiles about as well as lower ones; and what of
// Supply is kSplitKeys and kFewBlocks.
enum Masking { kEveryKey, kSomeKeys, kWindow, kPages, kWholePages, kPairs, kFilled, kParts, kLone };

// What the GPU's processors have to do: there are blocks for all of them, or the keys are split into parts, or there is
// less, and blocks of 64 rows make the most of it.
enum Supply { kManyBlocks, kSplitKeys, kFewBlocks };

// What a warpgroup's rows see.
struct Sight {
  Masking masking;
  i64 reach;   // kWindow: keys that a row sees beside its own
  i64 tokens;  // that the 64 rows belong to
  i32 page;    // most rows of a box of a page of keys; 0: not paged
  Supply supply = kManyBlocks;
};

constexpr int kAnyRows = 1 << 30;

struct FwdSm90Tune {
  int max_rows;            // query rows (packed with heads), where there are few
  int max_dim, max_dim_v;  // head_dim and head_dim_v, rounded up to 16
  int masking;             // for kSomeKeys: any call, else for such calls alone
  int block_m, block_n, stages, pingpong, overlap, stages_q, staging;
  int least_rows = 0;
};

// clang-format off
constexpr FwdSm90Tune kFwdSm90Tune[] = {
    // One consumer: the memory's rate matters, not the tensor cores. It is best with 64 KB on their way to each
    // multiprocessor; 160 KB were a tenth slower.
    {64,  64,  64, kSomeKeys,  64, 128, 2, 0, 1, 1, kFromRegisters},
    {64, 128, 128, kSomeKeys,  64,  64, 2, 0, 1, 1, kFromRegisters},
    {64, 192, 192, kSomeKeys,  64,  48, 2, 0, 1, 1, kFromRegisters},
    {64, 256, 256, kSomeKeys,  64,  32, 2, 0, 1, 1, kFromRegisters},
    // One sequence of few heads: blocks of one consumer, or parts of the keys.
    {kAnyRows,  64,  64,   kLone,  64, 128, 3, 0, 0, 1, kFromRegisters},
    {kAnyRows, 128, 128,   kLone,  64, 128, 2, 0, 0, 1, kFromRegisters},
    {kAnyRows, 192, 128,   kLone,  64,  64, 2, 0, 0, 1, kFromRegisters},
    {kAnyRows, 192, 192,   kLone,  64,  64, 2, 0, 1, 1, kFromRegisters},
    {kAnyRows, 256, 256,   kLone,  64,  64, 2, 0, 1, 1, kFromRegisters},
    {kAnyRows, 128, 128,  kParts, 128,  64, 3, 1, 0, 2, kInPlaceOfQ},
    // Windows: of their rows, here and below, and the first other one that fits, the one that computes the fewest keys
    // (window_cost).
    {kAnyRows,  64,  64, kWindow, 256,  64, 4, 1, 0, 2, kInPlaceOfQ},
    {kAnyRows,  64,  64, kWindow, 256,  80, 4, 1, 0, 2, kInPlaceOfQ},
    {kAnyRows,  96,  96, kWindow, 256,  48, 3, 1, 0, 2, kInPlaceOfQ},
    // Short sequences: of smaller tiles less is computed for nothing, and 1024 rows are 5.3 tiles of 192. Soft caps take
    // what overlaps. Pages of 64 come in one box where tiles hold as many keys.
    {     192,  64,  64, kSomeKeys, 192, 128, 3, 1, 1, 2, kInPlaceOfQ},
    {kAnyRows,  64,  64, kSomeKeys, 256,  64, 4, 1, 0, 2, kInPlaceOfQ},
    {kAnyRows,  64,  64, kSomeKeys, 192, 128, 3, 1, 1, 2, kInPlaceOfQ},
    {    1024,  96,  96, kSomeKeys, 256,  48, 3, 1, 0, 2, kInPlaceOfQ},
    {kAnyRows,  96,  96, kSomeKeys, 192,  64, 3, 1, 0, 2, kInPlaceOfQ},
    {kAnyRows,  96,  96, kSomeKeys, 192, 112, 2, 1, 1, 2, kInPlaceOfQ},
    {kAnyRows,  64, 128,   kWindow, 192,  64, 4, 1, 0, 2, kInOwnPlace},
    {kAnyRows,  64, 128, kWholePages, 192, 64, 4, 1, 0, 2, kInOwnPlace},
    {kAnyRows,  64, 128,    kPages, 192,  80, 4, 1, 0, 2, kInOwnPlace},
    {    4096,  64, 128, kSomeKeys, 192,  64, 4, 1, 0, 2, kInOwnPlace},
    {kAnyRows,  64, 128, kSomeKeys, 192,  80, 4, 1, 0, 2, kInOwnPlace},
    {    1024, 128, 128,   kFilled, 192,  64, 3, 1, 0, 2, kInPlaceOfQ},
    {    1024, 128, 128, kEveryKey, 128, 128, 2, 1, 0, 2, kInPlaceOfQ},
    {kAnyRows, 128, 128,   kWindow, 192,  48, 4, 1, 0, 2, kInPlaceOfQ},
    {     256, 128, 128, kSomeKeys, 128, 128, 2, 1, 0, 2, kInPlaceOfQ},
    {kAnyRows, 128, 128, kSomeKeys, 192,  64, 3, 1, 0, 2, kInPlaceOfQ},
    {kAnyRows, 128, 128, kSomeKeys, 128, 128, 2, 1, 0, 2, kInPlaceOfQ},  // where there are few
    {    1024, 128, 128, kEveryKey, 128, 128, 2, 1, 1, 2, kInPlaceOfQ},
    {     512, 128, 128, kSomeKeys, 128, 128, 2, 1, 1, 2, kInPlaceOfQ},
    {kAnyRows, 128, 128,    kPages, 128, 128, 2, 1, 1, 2, kInPlaceOfQ},
    {kAnyRows, 128, 128, kSomeKeys, 192,  80, 3, 1, 1, 2, kInPlaceOfQ},
    {kAnyRows, 128, 128, kSomeKeys, 128, 128, 2, 1, 1, 2, kInPlaceOfQ},
    {kAnyRows, 192, 128,    kPages, 192,  64, 3, 1, 0, 1, kFromRegisters},
    {kAnyRows, 192, 128, kSomeKeys, 128,  64, 3, 1, 0, 2, kInPlaceOfQ},
    {    1024, 192, 128, kSomeKeys, 128,  64, 3, 1, 1, 2, kInPlaceOfQ},
    {    4096, 192, 128, kSomeKeys, 192,  64, 3, 1, 1, 1, kFromRegisters},
    {kAnyRows, 192, 128, kSomeKeys, 192,  80, 2, 1, 1, 1, kFromRegisters},
    // Wide heads. Pairs read L2 half as often: up to 2 % in long sequences, where the GPU's power is what binds.
    {kAnyRows, 256, 128, kSomeKeys, 128,  96, 2, 0, 1, 1, kFromRegisters},
    {kAnyRows, 128, 192,   kWindow, 128,  96, 2, 1, 0, 1, kFromRegisters},
    {kAnyRows, 128, 192, kSomeKeys, 128, 128, 2, 1, 0, 1, kFromRegisters},
    {kAnyRows, 128, 192, kSomeKeys, 128, 128, 2, 1, 1, 1, kFromRegisters},
    {kAnyRows, 192, 192,   kWindow, 128,  96, 2, 1, 0, 1, kFromRegisters},
    {kAnyRows, 192, 192, kSomeKeys, 128, 112, 2, 1, 0, 1, kFromRegisters},
    {kAnyRows, 192, 192, kSomeKeys, 128, 112, 2, 0, 1, 1, kFromRegisters},
    {kAnyRows, 128, 256,    kPairs, 128,  64, 3, 1, 0, 1, kFromRegisters, 4096},
    {kAnyRows, 128, 256, kSomeKeys, 128,  64, 3, 1, 0, 1, kFromRegisters},
    {kAnyRows, 128, 256, kSomeKeys, 128,  80, 2, 0, 1, 1, kFromRegisters},
    {kAnyRows, 256, 256,    kPairs, 128,  64, 2, 1, 1, 1, kFromRegisters, 4096},
    {kAnyRows, 256, 256, kSomeKeys, 128,  64, 2, 1, 1, 1, kFromRegisters},
};
// clang-format on

// Whether a row of the table is meant for calls of this kind.
constexpr bool meant(const FwdSm90Tune& row, i64 rows, const Sight& sight) {
  switch (row.masking) {
    case kPairs:
      return sight.masking == kEveryKey && !sight.page && ceil_div<i64>(rows, row.block_m) % 2 == 0;
    case kFilled: {
      constexpr i64 kLower = 128;  // rows of tiles that run 1/16 slower where both are full
      const auto padded = [&](i64 block_m) { return ceil_div(rows, block_m) * block_m; };
      return sight.masking == kEveryKey && padded(row.block_m) * 16 <= padded(kLower) * 17;
    }
    case kParts:
      return sight.supply == kSplitKeys;
    case kLone:
      return sight.supply == kFewBlocks;
    case kPages:
      return sight.page > 0;
    case kWholePages:
      return sight.page == 64;
    default:
      return row.masking == kSomeKeys || row.masking == sight.masking;
  }
}

// False where the tile does not fit.
constexpr bool set_tile(FwdSm90Config& c, const FwdSm90Tune& row, i64 rows, const Sight& sight, i64 smem_per_block) {
  c.block_m = row.block_m;
  c.block_n = row.block_n;
  c.stages = row.stages;
  c.pingpong = row.pingpong;
  c.overlap = row.overlap;
  c.cluster = row.masking == kPairs && meant(row, rows, sight) ? 2 : 1;
  c.paged = sight.page ? std::gcd(sight.page, c.block_n) : 0;
  const bool registers = !(c.packed && c.softcap);  // for more than the least
  c.stages_q = registers ? row.stages_q : 1;
  c.staging = registers ? row.staging : i32(kFromRegisters);
  if (!valid(c)) c.staging = kFromRegisters;  // rows wider than their queries have no place there
  return valid(c) && smem_bytes(c) <= smem_per_block;
}

// Keys that the busiest warpgroup of a tile computes, since the others take turns with it, and a few for each step,
// where tiles end with the tile's last row (Mask::shift), with pages where its last box does.
constexpr i64 window_cost(const FwdSm90Config& c, const Sight& sight) {
  constexpr i64 kStep = 18;
  // What a key costs in long sequences, as measured.
  const i64 per_key = c.overlap ? 36 : (consumers(c) == 4 ? 29 : 33) + (joins_products(c) ? 0 : 2);
  const i64 reach = sight.reach + max(0, c.paged - 1);
  i64 tiles = 0;
  for (i64 w = 0; w < consumers(c); ++w)
    tiles = max(tiles, ceil_div((w + 1) * sight.tokens + reach, i64(c.block_n)) - w * sight.tokens / c.block_n);
  return tiles * (c.block_n + kStep) * per_key;
}

// Fills the tile of `c`, whose other fields are set, of at most `most` rows. False where no row fits.
constexpr bool tune_forward_sm90(FwdSm90Config& c, i64 rows, const Sight& sight, i64 smem_per_block,
                                 i32 most = kAnyRows) {
  FwdSm90Config best;
  i64 least = kUnbounded;
  for (const FwdSm90Tune& row : kFwdSm90Tune) {
    if (!meant(row, rows, sight) || rows > row.max_rows || rows < row.least_rows ||
        round_up_16(c.head_dim) > row.max_dim || round_up_16(c.head_dim_v) > row.max_dim_v || row.block_m > most)
      continue;
    if (!set_tile(c, row, rows, sight, smem_per_block)) continue;
    if (sight.masking != kWindow) return true;
    const i64 cost = window_cost(c, sight);
    if (cost < least) least = cost, best = c;
    if (row.masking == kWindow) continue;
    c = best;
    return true;
  }
  return false;
}

}  // namespace strobe::host
