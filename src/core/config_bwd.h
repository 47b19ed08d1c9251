// What changes the instructions of the backward kernels, and what follows from it: threads, tiles and shared memory.
#pragma once

#include "base.h"

namespace strobe {

// The main kernel: a block of block_n keys, a loop over tiles of block_m queries. S^T, dP^T, dK and dV are divided
// among warps_n rows of warps and warps / warps_n columns, dQ among warps_dq rows.
struct BwdConfig {
  i32 dtype = i32(DType::bf16);
  i32 head_dim = 128, head_dim_v = 128;
  i32 block_m = 64, block_n = 128;
  i32 warps = 8, warps_n = 4, warps_dq = 2;
  i32 stages_q = 2, stages_do = 2;  // tiles of Q and of dO in shared memory
  i32 blocks = 1;                   // that share a multiprocessor
  i32 softcap = 0, alibi = 0, dropout = 0;
  i32 deterministic = 0;

  constexpr bool operator==(const BwdConfig&) const = default;
};

template <class F>
constexpr void fields(const BwdConfig& c, F f) {
  f("dtype", c.dtype);
  f("head_dim", c.head_dim);
  f("head_dim_v", c.head_dim_v);
  f("block_m", c.block_m);
  f("block_n", c.block_n);
  f("warps", c.warps);
  f("warps_n", c.warps_n);
  f("warps_dq", c.warps_dq);
  f("stages_q", c.stages_q);
  f("stages_do", c.stages_do);
  f("blocks", c.blocks);
  f("softcap", c.softcap);
  f("alibi", c.alibi);
  f("dropout", c.dropout);
  f("deterministic", c.deterministic);
}

STROBE_HD constexpr int threads(const BwdConfig& c) { return c.warps * 32; }

// Whether a warp reads P^T that others wrote. Its own queries it keeps in registers, as left operands of dV and dK.
STROBE_HD constexpr bool bwd_shares_p(const BwdConfig& c) { return c.warps_n != c.warps; }

// Columns of the dQ accumulator: head_dim, rounded up so that each warp holds the same number of 16-column blocks.
STROBE_HD constexpr int bwd_dq_cols(const BwdConfig& c) {
  const int across = c.warps / c.warps_dq;
  return (round_up_16(c.head_dim) / 16 + across - 1) / across * across * 16;
}

// Rows in shared memory are 16 bytes longer than they need be: eight rows that an ldmatrix reads then lie in different
// banks, and every address is a lane's base plus a constant.
STROBE_HD constexpr int bwd_padded_bytes(int rows, int cols) { return rows * (cols + 8) * 2; }

// For what every thread knows but seldom needs: kept in shared memory, it takes no registers.
constexpr int kBwdStateBytes = 256;

struct BwdSmem {
  i32 k, v, q, dout, p, ds, stats, seen, state, bytes;  // offsets, of the first stage
};

STROBE_HD constexpr BwdSmem bwd_smem(const BwdConfig& c) {
  const int d = round_up_16(c.head_dim), dv = round_up_16(c.head_dim_v);
  const int tile = bwd_padded_bytes(c.block_n, c.block_m);
  BwdSmem s = {};
  s.k = 0;
  s.v = s.k + bwd_padded_bytes(c.block_n, d);
  s.q = s.v + bwd_padded_bytes(c.block_n, dv);
  s.dout = s.q + c.stages_q * bwd_padded_bytes(c.block_m, d);
  s.p = s.dout + c.stages_do * bwd_padded_bytes(c.block_m, dv);
  s.ds = s.p + (bwd_shares_p(c) ? tile : 0);
  s.stats = s.ds + tile;
  s.seen = s.stats + c.stages_q * 2 * c.block_m * 4;
  s.state = s.seen + c.block_n * 16;
  s.bytes = s.state + kBwdStateBytes;
  return s;
}

STROBE_HD constexpr i64 smem_bytes(const BwdConfig& c) { return bwd_smem(c).bytes; }

STROBE_HD constexpr bool valid(const BwdConfig& c) {
  const auto stages = [](int n) { return n == 1 || n == 2; };
  const bool type = c.dtype == i32(DType::f16) || c.dtype == i32(DType::bf16);
  return type && stages(c.stages_q) && stages(c.stages_do) && c.head_dim > 0 && c.head_dim % 8 == 0 &&
         c.head_dim_v > 0 && c.head_dim_v % 8 == 0 && c.warps > 0 && c.warps % c.warps_n == 0 &&
         c.warps % c.warps_dq == 0 && c.block_n % (c.warps_n * 16) == 0 &&
         c.block_m % (c.warps / c.warps_n * 16) == 0 && c.block_m % (c.warps_dq * 16) == 0;
}

// Before the main kernel: delta and LSE of a tile of queries, its dQ accumulator cleared.
struct BwdPreConfig {
  i32 dtype = i32(DType::bf16);
  i32 head_dim_v = 128;
  i32 block_m = 64;

  constexpr bool operator==(const BwdPreConfig&) const = default;
};
template <class F>
constexpr void fields(const BwdPreConfig& c, F f) {
  f("dtype", c.dtype);
  f("head_dim_v", c.head_dim_v);
  f("block_m", c.block_m);
}
STROBE_HD constexpr int threads(const BwdPreConfig&) { return 256; }
STROBE_HD constexpr i64 smem_bytes(const BwdPreConfig&) { return 0; }
STROBE_HD constexpr bool valid(const BwdPreConfig& c) { return c.head_dim_v % 8 == 0 && c.block_m % 16 == 0; }

// The same, and all that concerns few kept tokens ahead of a window. Tiles and warps are those of the main kernel.
constexpr int kBwdKept = 16;  // kept tokens at most: rows of a fragment
struct BwdKeptConfig {
  i32 dtype = i32(DType::bf16);
  i32 head_dim = 128, head_dim_v = 128;
  i32 block_m = 64;
  i32 warps = 8, warps_dq = 2;
  i32 softcap = 0, alibi = 0, dropout = 0;

  constexpr bool operator==(const BwdKeptConfig&) const = default;
};
template <class F>
constexpr void fields(const BwdKeptConfig& c, F f) {
  f("dtype", c.dtype);
  f("head_dim", c.head_dim);
  f("head_dim_v", c.head_dim_v);
  f("block_m", c.block_m);
  f("warps", c.warps);
  f("warps_dq", c.warps_dq);
  f("softcap", c.softcap);
  f("alibi", c.alibi);
  f("dropout", c.dropout);
}
STROBE_HD constexpr int threads(const BwdKeptConfig& c) { return c.warps * 32; }
struct BwdKeptSmem {
  i32 k, v, q, dout, p, ds, stats, seen, bytes;  // offsets
};
STROBE_HD constexpr BwdKeptSmem bwd_kept_smem(const BwdKeptConfig& c) {
  const int d = round_up_16(c.head_dim), dv = round_up_16(c.head_dim_v);
  BwdKeptSmem s = {};
  s.v = s.k + bwd_padded_bytes(kBwdKept, d);
  s.q = s.v + bwd_padded_bytes(kBwdKept, dv);
  s.dout = s.q + bwd_padded_bytes(c.block_m, d);
  s.p = s.dout + bwd_padded_bytes(c.block_m, dv);
  s.ds = s.p + bwd_padded_bytes(kBwdKept, c.block_m);
  s.stats = s.ds + bwd_padded_bytes(kBwdKept, c.block_m);
  s.seen = s.stats + 2 * c.block_m * 4;
  s.bytes = s.seen + kBwdKept * 16;
  return s;
}
STROBE_HD constexpr i64 smem_bytes(const BwdKeptConfig& c) { return bwd_kept_smem(c).bytes; }
STROBE_HD constexpr bool valid(const BwdKeptConfig& c) {
  return c.head_dim % 8 == 0 && c.head_dim_v % 8 == 0 && c.warps % c.warps_dq == 0 &&
         c.block_m % (c.warps_dq * 16) == 0 && c.block_m <= c.warps * 16;
}

// After it: the dQ accumulator of a tile, in the order of the main kernel's fragments, becomes rows of dq.
struct BwdPostConfig {
  i32 dtype = i32(DType::bf16);
  i32 head_dim = 128;
  i32 block_m = 64;
  i32 warps = 8, warps_dq = 2;

  constexpr bool operator==(const BwdPostConfig&) const = default;
};
template <class F>
constexpr void fields(const BwdPostConfig& c, F f) {
  f("dtype", c.dtype);
  f("head_dim", c.head_dim);
  f("block_m", c.block_m);
  f("warps", c.warps);
  f("warps_dq", c.warps_dq);
}
STROBE_HD constexpr int threads(const BwdPostConfig& c) { return c.warps * 32; }
STROBE_HD constexpr i64 smem_bytes(const BwdPostConfig& c) {
  return bwd_padded_bytes(c.block_m, round_up_16(c.head_dim));
}
STROBE_HD constexpr bool valid(const BwdPostConfig& c) {
  return c.head_dim % 8 == 0 && c.warps % c.warps_dq == 0 && c.block_m % (c.warps_dq * 16) == 0;
}

// Where several blocks share a key head: the sum of their dK or dV.
struct BwdSumConfig {
  i32 dtype = i32(DType::bf16);

  constexpr bool operator==(const BwdSumConfig&) const = default;
};
template <class F>
constexpr void fields(const BwdSumConfig& c, F f) {
  f("dtype", c.dtype);
}
STROBE_HD constexpr int threads(const BwdSumConfig&) { return 256; }
// Thread blocks for a block of keys.
STROBE_HD constexpr i64 bwd_sum_blocks(i64 block_n, i64 dim, i64 threads) {
  return ceil_div(block_n * (dim / 8), threads);
}
STROBE_HD constexpr i64 smem_bytes(const BwdSumConfig&) { return 0; }
STROBE_HD constexpr bool valid(const BwdSumConfig&) { return true; }

}  // namespace strobe
