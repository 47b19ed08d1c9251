// The one definition of visibility: which keys a query sees, as intervals, as tiles, and transposed.
//
//   visible(i, j)  <=>  j < min(seqlen_k, i + off + right + 1)  and  (j >= max(0, i + off - left)  or  j < keep_first)
//
// with off = seqlen_k - seqlen_q, and left unbounded for rows i >= full_from. A row's keys are two intervals at most
// (kept tokens, window) whose ends never decrease with i on either side of full_from; everything below follows from
// that.
//
// Int is i64 (Mask, Walk), or i32 (Mask32, Walk32), which takes a GPU fewer instructions: there every length stays
// below kUnbounded32, which stands for kUnbounded and for every longer window.
#pragma once

#include "base.h"

namespace strobe {

// The keys of a row: [0, kept_end) and [begin, end), with kept_end <= begin; kept tokens that touch the window belong
// to it.
template <class Int>
struct BasicKeys {
  Int kept_end, begin, end;
};

// The rows that see a key: [begin, end) through the window or a kept token, and [full_begin, full_end) from full_from
// on.
template <class Int>
struct BasicQueries {
  Int begin, end, full_begin, full_end;
};

// Tiles [begin, end), of which [full_begin, full_end) hold no masked pair.
template <class Int>
struct BasicRun {
  Int begin, full_begin, full_end, end;

  STROBE_HD static BasicRun of(Int begin, Int full_begin, Int full_end, Int end) {
    end = max(begin, end);
    full_begin = max(begin, full_begin);
    full_end = min(full_end, end);
    if (full_end <= full_begin) full_begin = full_end = begin;
    return {begin, full_begin, full_end, end};
  }
};

// Tiles to visit, in increasing order, each once. Either run may be empty.
template <class Int>
struct BasicWalk {
  BasicRun<Int> run[2];

  STROBE_HD static BasicWalk of(BasicRun<Int> run) { return {{run, {run.end, run.end, run.end, run.end}}}; }
  STROBE_HD Int tiles() const { return run[0].end - run[0].begin + run[1].end - run[1].begin; }
};

template <class Int>
struct BasicMask {
  using Keys = BasicKeys<Int>;
  using Queries = BasicQueries<Int>;
  using Run = BasicRun<Int>;
  using Walk = BasicWalk<Int>;

  Int seqlen_q, seqlen_k;
  Int left, right;  // >= 0, kUnbounded (i32: kUnbounded32) for none
  Int keep_first;
  Int full_from;  // the same for none

  STROBE_HD Int off() const { return seqlen_k - seqlen_q; }
  STROBE_HD Int row_end(Int i) const { return max<Int>(0, min(seqlen_k, i + off() + right + 1)); }
  STROBE_HD Int row_begin(Int i) const { return i >= full_from ? 0 : max<Int>(0, i + off() - left); }
  STROBE_HD Int col_begin(Int j) const { return min(seqlen_q, max<Int>(0, j - off() - right)); }
  STROBE_HD Int col_end(Int j) const {
    return j < keep_first ? seqlen_q : min(seqlen_q, max<Int>(0, j - off() + left + 1));
  }

  STROBE_HD Keys keys(Int i) const {
    const Int begin = row_begin(i), end = row_end(i), kept = min(keep_first, end);
    return kept >= begin ? Keys{0, 0, end} : Keys{kept, begin, end};
  }

  STROBE_HD bool visible(Int i, Int j) const {
    const Keys row = keys(i);
    return j < row.kept_end || (j >= row.begin && j < row.end);
  }

  STROBE_HD Queries queries(Int j) const {
    if (j >= seqlen_k) return {0, 0, 0, 0};
    const Int begin = col_begin(j), end = max(begin, col_end(j));
    const Int full_begin = min(seqlen_q, max(end, full_from));
    return {begin, end, full_begin, seqlen_q};
  }

  // Key tiles of block_n keys that rows [first, last) see. A tile is full when every row sees all of its block_n keys.
  STROBE_HD Walk visit(Int first, Int last, Int block_n) const {
    last = min(last, seqlen_q);
    if (first >= last) return Walk::of({0, 0, 0, 0});
    const Int windowed_end = min(max(full_from, first), last);  // rows [first, windowed_end) have a left bound
    const Int end_first = row_end(first), end_last = row_end(last - 1);
    const Int tiles_end = ceil_div(end_last, block_n), full_end = end_first / block_n;
    if (windowed_end == first) return Walk::of(Run::of(0, 0, full_end, tiles_end));

    // The last windowed row has the tightest left bound; where kept tokens reach it, they reach it in every row.
    const Int begin_first = row_begin(first), begin_last = keys(windowed_end - 1).begin;
    const Int full_begin = ceil_div(begin_last, block_n);
    if (begin_last == 0) return Walk::of(Run::of(0, 0, full_end, tiles_end));
    const Int kept_end = ceil_div(min(keep_first, end_last), block_n);
    const Int window_begin = windowed_end < last ? 0 : begin_first / block_n;
    const Run kept = Run::of(0, 0, min(keep_first, end_first) / block_n, kept_end);
    return {{kept, Run::of(max(kept_end, window_begin), full_begin, full_end, max(kept_end, tiles_end))}};
  }

  // Keys by which the window's tiles may begin before multiples of block_n, so that the last one ends where the last
  // row of [first, last) does: on the average nearly a tile less. A mask whose seqlen_k is longer by as much has these
  // tiles in the second run of its walk; key j of the window is key j + shift there. Kept tokens, the first run, stay.
  STROBE_HD Int shift(Int first, Int last, Int block_n) const {
    last = min(last, seqlen_q);
    const Int kept_end = ceil_div(min(keep_first, seqlen_k), block_n) * block_n;
    // No tile of the window may begin before the kept ones' end, nor before the sequence.
    if (first >= last || last > full_from || first + off() - left < kept_end + block_n) return 0;
    const u32 beyond = u32(row_end(last - 1)) % u32(block_n);
    return beyond ? block_n - Int(beyond) : 0;
  }

  // Those of the tiles [begin, end) that some row of [first, last) sees, in a walk's run over more rows. Only a window
  // in a run of its own, which kept tokens do not reach, hides tiles before it.
  STROBE_HD Run narrowed(Int begin, Int end, bool window, Int first, Int last, Int block_n) const {
    last = min(last, seqlen_q) - 1;
    if (first > last) return Run::of(begin, begin, begin, begin);
    const Keys last_keys = keys(last);
    end = max(begin, min(end, ceil_div(last_keys.end, block_n)));
    if (window) begin = max(begin, min(end, min(keys(first).begin, last_keys.begin) / block_n));
    return Run::of(begin, begin, begin, end);
  }

  // The transpose: query tiles of block_m rows that see keys [first, last). Rows beyond seqlen_q do not exist, keys
  // beyond seqlen_k are masked.
  STROBE_HD Walk visit_queries(Int first, Int last, Int block_m) const {
    const Int last_key = min(last, seqlen_k) - 1;
    if (first > last_key) return Walk::of({0, 0, 0, 0});
    const Int all_end = ceil_div(seqlen_q, block_m);
    const Int full_from_row = min(full_from, seqlen_q);
    const Int begin = col_begin(first), end = col_end(last_key);
    // Rows that see every key: [full_begin, full_end) by the window, and from full_from on. None when keys are missing.
    const Int full_begin = last <= seqlen_k ? col_begin(last_key) : seqlen_q;
    const Int first_windowed = max(first, keep_first);
    const Int full_end = first_windowed < last ? col_end(first_windowed) : seqlen_q;
    const Int full_tile_begin = ceil_div(full_begin, block_m);
    if (full_end >= full_from_row) {  // no gap between the two
      const Int full_tile_end = full_begin < seqlen_q ? all_end : 0;
      return Walk::of(begin < seqlen_q ? Run::of(begin / block_m, full_tile_begin, full_tile_end, all_end)
                                       : Run{0, 0, 0, 0});
    }
    const bool kept = first < keep_first;
    if (begin >= seqlen_q) return Walk::of({0, 0, 0, 0});
    if (full_from_row >= seqlen_q && !kept)
      return Walk::of(
          Run::of(begin / block_m, full_tile_begin, full_end / block_m, end > begin ? ceil_div(end, block_m) : 0));
    const Int second = min(seqlen_q, max(begin, full_from_row)) / block_m;
    const Int second_full = full_begin < seqlen_q ? ceil_div(max(full_begin, full_from_row), block_m) : all_end;
    const Int window_end = kept ? second : min(second, end > begin ? ceil_div(end, block_m) : 0);
    const Run window = Run::of(begin / block_m, full_tile_begin, full_end / block_m, window_end);
    return {{window, Run::of(max(second, window.end), second_full, all_end, all_end)}};
  }
};

// Tiles number first .. last - 1 of the walk.
template <class Int>
STROBE_HD BasicWalk<Int> split(const BasicWalk<Int>& walk, Int first, Int last) {
  BasicWalk<Int> part;
  Int before = 0;
  for (int r = 0; r < 2; ++r) {
    const BasicRun<Int>& run = walk.run[r];
    const Int count = run.end - run.begin;
    const Int begin = run.begin + min(count, max<Int>(0, first - before));
    const Int end = run.begin + min(count, max<Int>(0, last - before));
    part.run[r] = BasicRun<Int>::of(begin, run.full_begin, run.full_end, end);
    before += count;
  }
  return part;
}

// How many tiles of the walk come before `tile`.
template <class Int>
STROBE_HD Int rank(const BasicWalk<Int>& walk, Int tile) {
  Int before = 0;
  for (const BasicRun<Int>& run : walk.run) before += min(run.end, max(run.begin, tile)) - run.begin;
  return before;
}

using Keys = BasicKeys<i64>;
using Queries = BasicQueries<i64>;
using Run = BasicRun<i64>;
using Walk = BasicWalk<i64>;
using Mask = BasicMask<i64>;
using Run32 = BasicRun<i32>;
using Walk32 = BasicWalk<i32>;
using Mask32 = BasicMask<i32>;

// The same mask where lengths stay below kUnbounded32: sums of three of them do not overflow, and a window of that many
// keys hides none.
STROBE_HD Mask32 narrow(const Mask& mask) {
  const auto bounded = [](i64 value) { return i32(min<i64>(value, kUnbounded32)); };
  return {i32(mask.seqlen_q),  i32(mask.seqlen_k),       bounded(mask.left),
          bounded(mask.right), bounded(mask.keep_first), bounded(mask.full_from)};
}

}  // namespace strobe
