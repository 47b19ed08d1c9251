// Parameters of the backward kernels: the problem, and where its workspace lies.
#pragma once

#include "config_bwd.h"
#include "params.h"
#include "seqlen.h"

namespace strobe {

// A sequence's first key tile in partial results; those of packed sequences do not overlap.
STROBE_HD i64 bwd_first_k_tile(const AttnParams& p, const SeqInfo& s, i64 max_k_tiles, i64 block_n) {
  return p.cu_seqlens_k ? (s.k_begin - s.leftpad) / block_n + s.batch : s.batch * max_k_tiles;
}

// Blocks of keys add to a tile of dQ in increasing order, each warp to its own part: warp w's word of the tile holds
// the block that is next. Behind the words, where the order jumps from kept tokens to the window: the block before and
// the block after.
struct BwdTurns {
  u32 jump_from, jump_to;

  STROBE_HD static BwdTurns of(const Walk& walk) { return {u32(walk.run[0].end - 1), u32(walk.run[1].begin)}; }
  STROBE_HD u32 after(u32 block) const { return block == jump_from ? jump_to : block + 1; }
};

struct BwdLaunch {
  BackwardParams p;
  float* stats;          // [num_heads, q_tiles, 2, block_m]: -LSE in units of log2, delta
  float* dq_acc;         // [num_heads, q_tiles, block_m * dq_cols], in the order of fragments
  u32* turns;            // [num_heads, q_tiles, warps + 2]: whose turn it is (BwdTurns); null where any order will do
  float* dk_parts;       // [num_heads / heads_per_block, k_tiles, block_n, head_dim]; null where there are none
  float* dv_parts;       // likewise with head_dim_v
  float* sinks;          // [num_heads, batch, max_q_tiles]; null without ds_aux
  float* kept_parts;     // [num_heads, batch, kept_chunks, kept, head_dim + head_dim_v]; null where kept is 0
  i64 q_tiles, k_tiles;  // of all sequences, per head; k_tiles: of those with partial results
  i64 max_q_tiles, max_k_tiles;  // of one sequence
  i64 dq_tile;                   // block_m * dq_cols
  i64 turns_per_tile;            // warps of the main kernel + 2
  i64 heads_per_block;           // query heads that one block of the main kernel takes, one after another
  i64 block_n;                   // keys of a block of the main kernel
  i32 per_k, per_v;              // query heads that share a head of k, of v
  i32 first_blocks;              // blocks of keys, of each sequence, that are started before all others
  i32 first_heads;               // heads_per_block of those
  i32 kept;                      // kept tokens that are not the main kernel's, but bwd_kept's: all of them or 0
  i32 kept_tiles;                // tiles of queries that one block of bwd_kept takes

  // The first block of keys that has partial results: those that take all heads at once write dk and dv.
  STROBE_HD i32 first_part() const { return first_heads != heads_per_block ? first_blocks : 0; }
  STROBE_HD i64 kept_chunks() const { return ceil_div<i64>(max_q_tiles, kept_tiles); }

  // The main kernel's. It leaves out kept tokens that are bwd_kept's: those that a window reaches it hides by itself.
  STROBE_HD Mask main_mask(const SeqInfo& s) const {
    Mask mask = mask_of(p.fwd, s);
    if (kept > 0) mask.keep_first = 0;
    return mask;
  }

  // The sequence's first tile in stats and dq_acc; tiles of packed sequences do not overlap.
  STROBE_HD i64 first_q_tile(const SeqInfo& s, i64 block_m) const {
    return p.fwd.cu_seqlens_q ? s.q_begin / block_m + s.batch : s.batch * max_q_tiles;
  }
};

// One of dk and dv.
struct BwdSumLaunch {
  AttnParams p;
  Rows out;
  const float* parts;  // [num_heads / heads_per_block, k_tiles, block_n, dim]
  i64 dim, count;      // parts of each head of out
  i64 k_tiles, max_k_tiles, block_n;
  i64 first;  // block of keys
};

}  // namespace strobe
