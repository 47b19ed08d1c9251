// Forward Configs: what changes a kernel's instructions and nothing else. A Config is a C++20 template argument, is
// compared and hashed as integers, and is printed by fields().
#pragma once

#include "base.h"

namespace strobe {

struct FwdConfig {
  i32 dtype = 0;                     // DType
  i32 head_dim = 0, head_dim_v = 0;  // as in memory
  i32 block_m = 0, block_n = 0;      // query rows and keys of a tile
  i32 warps = 0, stages = 0;
  i32 q_in_registers = 0;
  i32 paged = 0;
  i32 split = 0;  // writes partial results
  i32 pack = 0;   // query heads that share K and V heads share a tile
  i32 softcap = 0;
  i32 alibi = 0;  // or a scale that is not positive: any score that is not a positive multiple of q.k
  i32 dropout = 0;

  constexpr bool operator==(const FwdConfig&) const = default;
};

template <class F>
constexpr void fields(const FwdConfig& c, F f) {
  f("dtype", c.dtype);
  f("head_dim", c.head_dim);
  f("head_dim_v", c.head_dim_v);
  f("block_m", c.block_m);
  f("block_n", c.block_n);
  f("warps", c.warps);
  f("stages", c.stages);
  f("q_in_registers", c.q_in_registers);
  f("paged", c.paged);
  f("split", c.split);
  f("pack", c.pack);
  f("softcap", c.softcap);
  f("alibi", c.alibi);
  f("dropout", c.dropout);
}

// Columns of V that one block computes: an accumulator of more than 256 columns has no room in registers.
constexpr int value_slices(const FwdConfig& c) { return (c.head_dim_v + 255) / 256; }
constexpr int value_slice(const FwdConfig& c) { return c.head_dim_v / value_slices(c); }

// Warps stand side by side over the rows first; those that are left share the rows and divide a tile's keys.
constexpr int warps_m(const FwdConfig& c) { return min(c.warps, c.block_m / 16); }
constexpr int warps_n(const FwdConfig& c) { return c.warps / warps_m(c); }

constexpr int threads(const FwdConfig& c) { return c.warps * 32; }

// Bytes of Q, and of one stage of K and V.
constexpr i64 query_bytes(const FwdConfig& c) { return i64(c.block_m) * round_up_16(c.head_dim) * 2; }
constexpr i64 key_bytes(const FwdConfig& c) { return i64(c.block_n) * round_up_16(c.head_dim) * 2; }
constexpr i64 value_bytes(const FwdConfig& c) { return i64(c.block_n) * round_up_16(value_slice(c)) * 2; }
// What each row sees, and each warp's rows together.
constexpr i64 bounds_bytes(const FwdConfig& c) { return i64(c.block_m + warps_m(c)) * 16; }
// After the loop the tiles make room for what warps exchange, or for the output on its way out.
constexpr i64 exchange_bytes(const FwdConfig& c) {
  const i64 merged = i64(warps_n(c) - 1) * c.block_m * (round_up_16(value_slice(c)) + 2 * 4) * 4;
  return max(merged, i64(c.block_m) * round_up_16(value_slice(c)) * 2);
}
constexpr i64 tile_bytes(const FwdConfig& c) {
  return max(query_bytes(c) + c.stages * (key_bytes(c) + value_bytes(c)), exchange_bytes(c));
}
constexpr i64 kSequenceBytes = 192;  // room for a SeqInfo, the order of its tiles and the block's work
constexpr i64 smem_bytes(const FwdConfig& c) { return tile_bytes(c) + bounds_bytes(c) + kSequenceBytes; }

constexpr bool valid(const FwdConfig& c) {
  return (c.dtype == i32(DType::f16) || c.dtype == i32(DType::bf16)) && c.head_dim > 0 && c.head_dim % 8 == 0 &&
         c.head_dim_v > 0 && c.head_dim_v % (8 * value_slices(c)) == 0 && c.block_m % (16 * warps_m(c)) == 0 &&
         c.warps % warps_m(c) == 0 && c.block_n % (16 * warps_n(c)) == 0 && c.stages >= 1 && !(c.pack && c.dropout);
}

// Merges the partial results of a split forward pass.
struct CombineConfig {
  i32 dtype = 0;
  i32 head_dim_v = 0;
  i32 rows = 1;  // of a block: one, whose parts its warps share, or kCombineRows for each of its warps

  constexpr bool operator==(const CombineConfig&) const = default;
};
template <class F>
constexpr void fields(const CombineConfig& c, F f) {
  f("dtype", c.dtype);
  f("head_dim_v", c.head_dim_v);
  f("rows", c.rows);
}
constexpr int kCombineWarps = 4, kCombineRows = 4;
constexpr int kFewParts = 8;  // that a warp merges alone
constexpr i32 rows_of_block(i64 parts) { return parts > kFewParts ? 1 : kCombineWarps * kCombineRows; }
constexpr int threads(const CombineConfig&) { return kCombineWarps * 32; }
constexpr i64 smem_bytes(const CombineConfig& c) { return c.rows == 1 ? i64(kCombineWarps - 1) * c.head_dim_v * 4 : 0; }
constexpr bool valid(const CombineConfig& c) {
  return c.head_dim_v > 0 && c.head_dim_v % 8 == 0 &&
         (c.rows == rows_of_block(kFewParts) || c.rows == rows_of_block(kFewParts + 1));
}

// Puts new keys and values into the cache and turns q by rotary position.
struct AppendConfig {
  i32 dtype = 0;

  constexpr bool operator==(const AppendConfig&) const = default;
};
template <class F>
constexpr void fields(const AppendConfig& c, F f) {
  f("dtype", c.dtype);
}
constexpr int threads(const AppendConfig&) { return 128; }
constexpr i64 smem_bytes(const AppendConfig&) { return 0; }
constexpr bool valid(const AppendConfig& c) { return c.dtype == i32(DType::f16) || c.dtype == i32(DType::bf16); }

}  // namespace strobe
