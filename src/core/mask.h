// The one definition of visibility: which keys a query sees, as intervals, as tiles, and transposed.
//
//   visible(i, j)  <=>  j < min(seqlen_k, i + off + right + 1)  and  (j >= max(0, i + off - left)  or  j < keep_first)
//
// with off = seqlen_k - seqlen_q, and left unbounded for rows i >= full_from. A row's keys are two intervals at most
// (kept tokens, window) whose ends never decrease with i on either side of full_from; everything below follows from
// that.
#pragma once

#include "base.h"

namespace strobe {

// The keys of a row: [0, kept_end) and [begin, end), with kept_end <= begin; kept tokens that touch the window belong
// to it.
struct Keys {
  i64 kept_end, begin, end;
};

// The rows that see a key: [begin, end) through the window or a kept token, and [full_begin, full_end) from full_from
// on.
struct Queries {
  i64 begin, end, full_begin, full_end;
};

// Tiles [begin, end), of which [full_begin, full_end) hold no masked pair.
struct Run {
  i64 begin, full_begin, full_end, end;
};

// Tiles to visit, in increasing order, each once. Either run may be empty.
struct Walk {
  Run run[2];
  STROBE_HD i64 tiles() const { return run[0].end - run[0].begin + run[1].end - run[1].begin; }
};

STROBE_HD Run make_run(i64 begin, i64 full_begin, i64 full_end, i64 end) {
  end = max(begin, end);
  full_begin = max(begin, full_begin);
  full_end = min(full_end, end);
  if (full_end <= full_begin) full_begin = full_end = begin;
  return {begin, full_begin, full_end, end};
}

STROBE_HD Walk one_run(Run run) { return {{run, {run.end, run.end, run.end, run.end}}}; }

struct Mask {
  i64 seqlen_q, seqlen_k;
  i64 left, right;  // >= 0, kUnbounded for none
  i64 keep_first;
  i64 full_from;  // kUnbounded for none

  STROBE_HD i64 off() const { return seqlen_k - seqlen_q; }
  STROBE_HD i64 row_end(i64 i) const { return max<i64>(0, min(seqlen_k, i + off() + right + 1)); }
  STROBE_HD i64 row_begin(i64 i) const { return i >= full_from ? 0 : max<i64>(0, i + off() - left); }
  STROBE_HD i64 col_begin(i64 j) const { return min(seqlen_q, max<i64>(0, j - off() - right)); }
  STROBE_HD i64 col_end(i64 j) const {
    return j < keep_first ? seqlen_q : min(seqlen_q, max<i64>(0, j - off() + left + 1));
  }

  STROBE_HD Keys keys(i64 i) const {
    const i64 begin = row_begin(i), end = row_end(i), kept = min(keep_first, end);
    return kept >= begin ? Keys{0, 0, end} : Keys{kept, begin, end};
  }

  STROBE_HD bool visible(i64 i, i64 j) const {
    const Keys row = keys(i);
    return j < row.kept_end || (j >= row.begin && j < row.end);
  }

  STROBE_HD Queries queries(i64 j) const {
    if (j >= seqlen_k) return {0, 0, 0, 0};
    const i64 begin = col_begin(j), end = max(begin, col_end(j));
    const i64 full_begin = min(seqlen_q, max(end, full_from));
    return {begin, end, full_begin, seqlen_q};
  }

  // Key tiles of block_n keys that rows [first, last) see. A tile is full when every row sees all of its block_n keys.
  STROBE_HD Walk visit(i64 first, i64 last, i64 block_n) const {
    last = min(last, seqlen_q);
    if (first >= last) return one_run({0, 0, 0, 0});
    const i64 windowed_end = min(max(full_from, first), last);  // rows [first, windowed_end) have a left bound
    const i64 end_first = row_end(first), end_last = row_end(last - 1);
    const i64 tiles_end = ceil_div(end_last, block_n), full_end = end_first / block_n;
    if (windowed_end == first) return one_run(make_run(0, 0, full_end, tiles_end));

    // The last windowed row has the tightest left bound; where kept tokens reach it, they reach it in every row.
    const i64 begin_first = row_begin(first), begin_last = keys(windowed_end - 1).begin;
    const i64 full_begin = ceil_div(begin_last, block_n);
    if (begin_last == 0) return one_run(make_run(0, 0, full_end, tiles_end));
    const i64 kept_end = ceil_div(min(keep_first, end_last), block_n);
    const i64 window_begin = windowed_end < last ? 0 : begin_first / block_n;
    const Run kept = make_run(0, 0, min(keep_first, end_first) / block_n, kept_end);
    return {{kept, make_run(max(kept_end, window_begin), full_begin, full_end, max(kept_end, tiles_end))}};
  }

  // Those of the tiles [begin, end) that some row of [first, last) sees, in a walk's run over more rows. Only a window
  // in a run of its own, which kept tokens do not reach, hides tiles before it.
  STROBE_HD Run narrowed(i64 begin, i64 end, bool window, i64 first, i64 last, i64 block_n) const {
    last = min(last, seqlen_q) - 1;
    if (first > last) return make_run(begin, begin, begin, begin);
    const Keys last_keys = keys(last);
    end = max(begin, min(end, ceil_div(last_keys.end, block_n)));
    if (window) begin = max(begin, min(end, min(keys(first).begin, last_keys.begin) / block_n));
    return make_run(begin, begin, begin, end);
  }

  // The transpose: query tiles of block_m rows that see keys [first, last). Rows beyond seqlen_q do not exist, keys
  // beyond seqlen_k are masked.
  STROBE_HD Walk visit_queries(i64 first, i64 last, i64 block_m) const {
    const i64 last_key = min(last, seqlen_k) - 1;
    if (first > last_key) return one_run({0, 0, 0, 0});
    const i64 all_end = ceil_div(seqlen_q, block_m);
    const i64 full_from_row = min(full_from, seqlen_q);
    const i64 begin = col_begin(first), end = col_end(last_key);
    // Rows that see every key: [full_begin, full_end) by the window, and from full_from on. None when keys are missing.
    const i64 full_begin = last <= seqlen_k ? col_begin(last_key) : seqlen_q;
    const i64 first_windowed = max(first, keep_first);
    const i64 full_end = first_windowed < last ? col_end(first_windowed) : seqlen_q;
    const i64 full_tile_begin = ceil_div(full_begin, block_m);
    if (full_end >= full_from_row) {  // no gap between the two
      const i64 full_tile_end = full_begin < seqlen_q ? all_end : 0;
      return one_run(begin < seqlen_q ? make_run(begin / block_m, full_tile_begin, full_tile_end, all_end)
                                      : Run{0, 0, 0, 0});
    }
    const bool kept = first < keep_first;
    if (begin >= seqlen_q) return one_run({0, 0, 0, 0});
    if (full_from_row >= seqlen_q && !kept)
      return one_run(
          make_run(begin / block_m, full_tile_begin, full_end / block_m, end > begin ? ceil_div(end, block_m) : 0));
    const i64 second = min(seqlen_q, max(begin, full_from_row)) / block_m;
    const i64 second_full = full_begin < seqlen_q ? ceil_div(max(full_begin, full_from_row), block_m) : all_end;
    const i64 window_end = kept ? second : min(second, end > begin ? ceil_div(end, block_m) : 0);
    const Run window = make_run(begin / block_m, full_tile_begin, full_end / block_m, window_end);
    return {{window, make_run(max(second, window.end), second_full, all_end, all_end)}};
  }
};

// Tiles number first .. last - 1 of the walk.
STROBE_HD Walk split(const Walk& walk, i64 first, i64 last) {
  Walk part;
  i64 before = 0;
  for (int r = 0; r < 2; ++r) {
    const Run& run = walk.run[r];
    const i64 count = run.end - run.begin;
    const i64 begin = run.begin + min(count, max<i64>(0, first - before));
    const i64 end = run.begin + min(count, max<i64>(0, last - before));
    part.run[r] = make_run(begin, run.full_begin, run.full_end, end);
    before += count;
  }
  return part;
}

// How many tiles of the walk come before `tile`.
STROBE_HD i64 rank(const Walk& walk, i64 tile) {
  i64 before = 0;
  for (const Run& run : walk.run) before += min(run.end, max(run.begin, tile)) - run.begin;
  return before;
}

}  // namespace strobe
