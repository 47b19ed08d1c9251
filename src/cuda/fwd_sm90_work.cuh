// Which rows, heads and keys a thread block of fwd_sm90 works on next. One warp asks, the scout or the first producing
// warp, and tells the others through shared memory.
#pragma once

#include "core/config_sm90.h"
#include "core/launch_sm90.h"
#include "core/mask.h"
#include "core/seqlen.h"
#include "cuda/apply.cuh"

namespace strobe {

// A number known when compiled, handed to a lambda.
template <int kValue>
struct Int {
  static constexpr int value = kValue;
  constexpr operator int() const { return value; }
};

// A tile's number, taken apart.
struct Sm90Tile {
  i32 batch, group, m_block, split;  // batch < 0: there are no more tiles
};

constexpr i32 kMaxInt = 0x7fffffff;
constexpr i32 kShortKeys = 256;  // sequences with fewer keys cost what starting a tile costs

// Of this block in its cluster.
template <FwdSm90Config C>
__device__ __forceinline__ u32 rank_of() {
  return blockIdx.x % u32(C.cluster);
}

// Deals out tiles, in rising order, to the blocks of a persistent grid. A cluster takes a tile for each of its blocks:
// neighbouring row blocks of a head.
template <FwdSm90Config C>
struct Sm90Scheduler {
  u32 number;  // the tile to work on, or the cluster's tiles
  // Packed: of the sequences that are dealt out now, those from first_batch on begin at tile `dealt`.
  i32 first_batch, dealt;
  i32 least, most;  // packed: these have more than `least` keys, and not more than `most`

  __device__ __forceinline__ void start(const FwdSm90Launch& launch) {
    first_batch = dealt = 0;
    least = launch.long_keys, most = kMaxInt;
    number = blockIdx.x / u32(C.cluster) - gridDim.x / u32(C.cluster);
  }
  // Called when the last tiles wait for their stages: a block that is still busy must not take another one.
  __device__ __forceinline__ void fetch(const FwdSm90Launch& launch) {
    if (launch.counter && i32(number) >= 0) {  // the first tile is the block's own: asking takes long
      u32 n = 0;
      if (lane_id() == 0) n = atomicAdd(launch.counter, 1u);
      number = gridDim.x + __shfl_sync(0xffffffffu, n, 0);
    } else {
      number += gridDim.x / u32(C.cluster);
    }
  }

  __device__ __forceinline__ Sm90Tile tile(const FwdSm90Launch& launch) {
    if constexpr (C.packed != 0) {
      return packed_tile(launch);
    } else {
      if (number >= u32(launch.tiles)) return {-1, 0, 0, 0};
      u32 n = number;
      i32 split = 0;
      if constexpr (C.split != 0) {
        split = i32(n % u32(launch.splits));
        n /= u32(launch.splits);
      }
      const u32 whole = u32(launch.section) * u32(launch.m_blocks), section = n / whole, rest = n - section * whole;
      const u32 all = u32(launch.groups) * u32(launch.p.batch);
      const u32 wide = min(u32(launch.section), all - section * u32(launch.section));
      const u32 row = rest / wide, head = section * u32(launch.section) + rest - row * wide;
      const u32 batch = head / u32(launch.groups);
      const i32 m_block = (launch.m_blocks - i32(row)) * C.cluster - 1 - i32(rank_of<C>());
      return {i32(batch), i32(head - batch * u32(launch.groups)), m_block, split};
    }
  }

  // Lanes look at 32 sequences at a time. Those with the most keys come first, in classes that are a factor of 4 apart:
  // the short ones fill the end, when not every block finds work. Within a sequence the last row blocks come first.
  __device__ __forceinline__ Sm90Tile packed_tile(const FwdSm90Launch& launch) {
    const i32 batches = i32(launch.p.batch), per_block = launch.groups * (C.split ? launch.splits : 1);
    for (;;) {
      if (first_batch >= batches) {
        if (least < 0) return {-1, 0, 0, 0};
        most = least, least = least > kShortKeys ? least / 4 : -1;
        first_batch = 0;
      }
      const i32 b = first_batch + lane_id();
      i32 blocks = 0;
      if (b < batches) {
        const SeqInfo seq = SeqInfo::of(launch.p, b);
        const i32 rows = i32(seq.rows_q) * (C.pack ? i32(launch.group.divisor) : 1), keys = i32(seq.seqlen_k);
        if (keys > least && keys <= most) blocks = (rows + C.block_m - 1) / C.block_m;
      }
      i32 end = blocks * per_block;
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        const i32 before = __shfl_up_sync(0xffffffffu, end, step);
        if (lane_id() >= step) end += before;
      }
      const i32 wanted = i32(number) - dealt;
      const u32 beyond = __ballot_sync(0xffffffffu, end > wanted);
      if (beyond == 0) {
        dealt += __shfl_sync(0xffffffffu, end, 31);
        first_batch += 32;
        continue;
      }
      const int lane = __ffs(int(beyond)) - 1;
      const i32 m_blocks = __shfl_sync(0xffffffffu, blocks, lane);
      u32 rest = u32(wanted - (__shfl_sync(0xffffffffu, end, lane) - m_blocks * per_block));
      i32 split = 0;
      if constexpr (C.split != 0) {
        split = i32(rest % u32(launch.splits));
        rest /= u32(launch.splits);
      }
      const u32 row = rest / u32(launch.groups);
      return {first_batch + lane, i32(rest - row * u32(launch.groups)), m_blocks - 1 - i32(row), split};
    }
  }
};

constexpr i32 kKeptAlone = 4;  // of Sm90Work::head.start

// What the consumers need to know of a work item. What they read first lies together: it stands between an item's end
// and the next one's start.
struct Sm90Work {
  struct alignas(16) {
    i32 first_row;  // packed rows: token * group + head within the group; -1: there is no more work
    i32 tiles;      // of the walk
    i32 stale;      // rows of V in the first tile that must not be read begin here
    i32 start;  // bit 0: the run of the first tile; 1: some tile is masked; kKeptAlone: of the run of kept tokens, the
                // first kKeptKeys keys are all that is seen, and have a step of their own
  } head;
  struct alignas(16) {
    i32 begin, full_begin, full_end, end;
  } run[2];  // of the walk
  struct alignas(8) {
    i32 begin, end;
  } seen[4][2];  // of each warpgroup and run: the tiles that its rows see
  Mask32 mask;   // for the bounds of the rows; seqlen_k counts the shift
  i64 out, lse;  // offsets of the first row and head; split: of its row in the partial results
  i32 rows_q;    // rows that exist
  i32 shift;     // keys by which tiles of run[1] begin before multiples of block_n; in them keys count from there
  i32 head_q;    // the first of the group
  i32 batch, head_k, head_v;
  i32 q_batch, q_row, k_batch, k_row;  // where the item's queries and the sequence's keys begin
};
static_assert(sizeof(Sm90Work) <= kWorkBytes);

}  // namespace strobe
