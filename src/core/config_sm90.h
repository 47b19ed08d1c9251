// Configs of the Hopper forward kernel.
#pragma once

#include "core/config.h"

namespace strobe {

// How an item's rows leave: from registers, or by tensor copies from shared memory, where they lie in the place of
// their queries or in a place of their own.
enum Staging { kFromRegisters, kInPlaceOfQ, kInOwnPlace };

struct FwdSm90Config {
  i32 dtype = 0;                     // DType
  i32 head_dim = 0, head_dim_v = 0;  // as in memory
  i32 block_m = 0, block_n = 0;      // query rows, 64 a consumer warpgroup, and keys of a tile
  i32 stages = 0;                    // of K and of V
  i32 stages_q = 1;                  // 2: an item's queries arrive before the item before has ended
  i32 pingpong = 0;                  // consumers take turns with the tensor cores
  i32 overlap = 1;  // a tile is multiplied by V under the next one's exponentials; 0: before they begin
  i32 packed = 0;   // sequences of their own lengths: a tile's sequence is found by a scan over them
  i32 paged = 0;    // rows of a box of K or V, which divide a page; 0: not paged
  i32 split = 0;    // writes partial results
  i32 pack = 0;     // query heads that share K and V heads share a tile
  i32 softcap = 0;
  i32 staging = kFromRegisters;
  i32 kept = 0;     // 1 to kKeptKeys kept tokens, which no window's tile reaches, have a step of their own
  i32 cluster = 1;  // 2: two blocks work on rows that see the same keys, and each copies half of every tile to both

  constexpr bool operator==(const FwdSm90Config&) const = default;
};

template <class F>
constexpr void fields(const FwdSm90Config& c, F f) {
  f("dtype", c.dtype);
  f("head_dim", c.head_dim);
  f("head_dim_v", c.head_dim_v);
  f("block_m", c.block_m);
  f("block_n", c.block_n);
  f("stages", c.stages);
  f("stages_q", c.stages_q);
  f("pingpong", c.pingpong);
  f("overlap", c.overlap);
  f("packed", c.packed);
  f("paged", c.paged);
  f("split", c.split);
  f("pack", c.pack);
  f("softcap", c.softcap);
  f("staging", c.staging);
  f("kept", c.kept);
  f("cluster", c.cluster);
}

constexpr int consumers(const FwdSm90Config& c) { return c.block_m / 64; }

// Warps that copy K and V. Where a tile comes in many boxes, issuing their copies takes one warp as long as the
// consumers take to compute it; more warps than boxes there must not be: one without any would fall behind the
// barriers.
constexpr int producer_warps(const FwdSm90Config& c) {
  return c.paged > 0 && c.paged < c.block_n ? min(3, c.block_n / c.paged) : 1;
}

// Finding an item's tiles takes longer than computing one. A warp of its own does it, the scout, but beside a single
// consumer and a single producer, which then takes items itself.
constexpr bool scouts(const FwdSm90Config& c) { return consumers(c) > 1 || producer_warps(c) > 1; }

// Of two stages of Q the scout also fills the free one: the producer would come to it only after an item's last keys. A
// single stage is free so late that the producer is there in time, unless it has many copies to issue.
constexpr bool scout_brings_q(const FwdSm90Config& c) { return scouts(c) && (c.stages_q > 1 || producer_warps(c) > 1); }

// The warp that takes items writes them. Beside several consumers all of its lanes do, and all of them tell of it; and
// whether the one that brings Q is that warp.
constexpr int telling_lanes(const FwdSm90Config& c) { return consumers(c) > 1 ? 32 : 1; }
constexpr int q_telling_lanes(const FwdSm90Config& c) { return scouts(c) && !scout_brings_q(c) ? 1 : telling_lanes(c); }

// Consumers come behind the producer's warpgroup. A single one comes first: no registers are dealt out, so that the
// producer needs no warpgroup.
constexpr int first_producer_warp(const FwdSm90Config& c) { return consumers(c) == 1 ? 4 : 0; }
constexpr int threads(const FwdSm90Config& c) {
  return 128 * consumers(c) + (consumers(c) == 1 ? 32 * (producer_warps(c) + scouts(c)) : 128);
}

// Shared memory holds panels of 64 columns, 128 bytes a row: the width of the swizzle.
constexpr int panels(int dim) { return (dim + 63) / 64; }
constexpr i64 query_bytes(const FwdSm90Config& c) { return i64(c.block_m) * panels(c.head_dim) * 128; }
constexpr i64 key_bytes(const FwdSm90Config& c) { return i64(c.block_n) * panels(c.head_dim) * 128; }
constexpr i64 value_bytes(const FwdSm90Config& c) { return i64(c.block_n) * panels(c.head_dim_v) * 128; }
constexpr i64 staging_bytes(const FwdSm90Config& c) {
  return c.staging == kInOwnPlace ? i64(c.block_m) * panels(c.head_dim_v) * 128 : 0;
}
constexpr i64 tile_bytes(const FwdSm90Config& c) {
  return c.stages_q * query_bytes(c) + c.stages * (key_bytes(c) + value_bytes(c)) + staging_bytes(c);
}
// What the producer hands over: the bounds of a work item's rows, and the items themselves in a ring.
constexpr i64 bounds_bytes(const FwdSm90Config& c) { return i64(c.block_m) * 16; }
constexpr int kWorkSlots = 4;
constexpr i64 kWorkBytes = 192;
constexpr i64 barrier_bytes(const FwdSm90Config& c) { return (2 + 2 * c.stages_q + 4 * c.stages) * 8; }
constexpr i64 smem_bytes(const FwdSm90Config& c) {
  return tile_bytes(c) + bounds_bytes(c) + kWorkSlots * kWorkBytes + barrier_bytes(c);
}

// Whether a warpgroup computes only those of an item's tiles that its own rows see. Wider outputs leave no register for
// it.
constexpr bool skips(const FwdSm90Config& c) { return round_up_16(c.head_dim_v) <= 192; }

// Whether the code of one step serves an item's first tile, too, and masked tiles. For wide outputs and soft caps
// another copy of it would take the compiler half a second, of the two that a first call may take; for others the first
// tile has a copy of its own, which is up to 2 % faster at short sequences.
constexpr bool one_step(const FwdSm90Config& c) { return c.softcap || round_up_16(c.head_dim_v) > 128; }

constexpr int kKeptKeys = 16;

constexpr int kStagedRows = 16;  // of a tensor copy: each warp sends its own, and waits for no other

// Registers of a thread, which setmaxnreg deals out: the pool is 64 K. A single consumer needs no dealing.
constexpr int producer_registers(const FwdSm90Config& c) { return consumers(c) >= 3 ? 32 : 40; }
constexpr int consumer_registers(const FwdSm90Config& c) {
  return consumers(c) == 4 ? 112 : consumers(c) == 3 ? 160 : 232;
}

// Without overlap: whether a tile's scores are issued right behind the tile before by V, so that the tensor cores do
// not stand still between the two. Probabilities and scores are then in registers at once. With fewer to spare the
// assembler spills, or makes each multiplication wait for the one before.
constexpr bool joins_products(const FwdSm90Config& c) {
  constexpr int kSpare = 32;
  if (c.kept && c.head_dim_v > 128) return false;  // 12 bytes of spills, for all that is spare
  const int keys = c.block_n + (c.kept ? kKeptKeys : 0);
  return !c.overlap && (2 * round_up_16(c.head_dim_v) + 3 * keys) / 4 <= consumer_registers(c) - kSpare;
}

constexpr bool valid(const FwdSm90Config& c) {
  return (c.dtype == i32(DType::f16) || c.dtype == i32(DType::bf16)) && c.head_dim % 8 == 0 && c.head_dim_v % 8 == 0 &&
         c.head_dim > 0 && c.head_dim <= 256 && c.head_dim_v > 0 && c.head_dim_v <= 256 && c.block_m > 0 &&
         c.block_m % 64 == 0 && c.block_m <= 256 && c.block_n % 16 == 0 && c.block_n > 0 && c.block_n <= 256 &&
         c.stages >= 2 && (c.stages_q == 1 || (c.stages_q == 2 && consumers(c) > 1)) &&
         !(c.pingpong && c.block_m == 64) && !(c.kept && !skips(c)) &&
         (c.overlap || !c.softcap) &&  // no registers for it
         (c.staging == kFromRegisters || !c.split) &&
         // Q's other place takes the next item's queries while rows leave.
         (c.staging != kInPlaceOfQ || (c.stages_q == 2 && panels(c.head_dim_v) <= panels(c.head_dim))) &&
         (c.cluster == 1 || (c.cluster == 2 && consumers(c) > 1 && !c.packed && !c.paged && !c.split)) &&
         (c.paged == 0 || (c.paged % 8 == 0 && c.block_n % c.paged == 0 && c.block_n / c.paged <= 32));
}

}  // namespace strobe
