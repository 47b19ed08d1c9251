// Brute force over random small problems: core/mask.h against the formula, pair by pair and tile by tile; Philox and
// softmax.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "core/mask.h"
#include "core/philox.h"
#include "core/softmax.h"

using namespace strobe;

namespace {

long passed = 0, failed = 0, shifted = 0;

void expect(bool held, const char* what, const Mask& m, i64 block_m, i64 block_n) {
  held ? ++passed : ++failed;
  if (!held && failed < 20)
    std::printf(
        "FAILED %s: seqlen_q %lld seqlen_k %lld left %lld right %lld keep_first %lld full_from %lld blocks %lld x "
        "%lld\n",
        what, m.seqlen_q, m.seqlen_k, m.left, m.right, m.keep_first, m.full_from, block_m, block_n);
}

// The definition, word for word.
bool visible(const Mask& m, i64 i, i64 j) {
  const i64 off = m.seqlen_k - m.seqlen_q, left = i >= m.full_from ? kUnbounded : m.left;
  return j < min(m.seqlen_k, i + off + m.right + 1) && (j >= max<i64>(0, i + off - left) || j < m.keep_first);
}

enum Tile : char { kSkipped, kPartial, kFull };

// Marks the tiles of one walk; false if they are out of order, twice or out of range.
template <class Mark>
bool mark(const Walk& walk, i64 limit, Mark set) {
  i64 last = -1, count = 0;
  for (const Run& run : walk.run)
    for (i64 t = run.begin; t < run.end; ++t, ++count) {
      if (t <= last || t >= limit || rank(walk, t) != count) return false;
      set(t, t >= run.full_begin && t < run.full_end ? kFull : kPartial);
      last = t;
    }
  return count == walk.tiles();
}

// Splits give the same tiles, in order, with the same fullness.
bool splits_cover(const Walk& walk, i64 parts) {
  std::vector<i64> whole, joined;
  const auto add = [](std::vector<i64>& to, const Walk& w) {
    mark(w, kUnbounded, [&](i64 t, Tile tile) { to.push_back(2 * t + (tile == kFull)); });
  };
  add(whole, walk);
  for (i64 s = 0; s < parts; ++s) add(joined, split(walk, walk.tiles() * s / parts, walk.tiles() * (s + 1) / parts));
  return whole == joined;
}

void check(const Mask& m, i64 block_m, i64 block_n, i64 parts) {
  const i64 tiles_m = ceil_div(m.seqlen_q, block_m), tiles_n = ceil_div(m.seqlen_k, block_n);
  bool rows_agree = true;
  for (i64 i = 0; i < m.seqlen_q; ++i)
    for (i64 j = 0; j < m.seqlen_k; ++j) {
      const Queries q = m.queries(j);
      const bool seen = (i >= q.begin && i < q.end) || (i >= q.full_begin && i < q.full_end);
      rows_agree &= m.visible(i, j) == visible(m, i, j) && seen == visible(m, i, j);
    }
  expect(rows_agree, "keys() or queries()", m, block_m, block_n);

  std::vector<char> forward(tiles_m * tiles_n, kSkipped), transposed(tiles_m * tiles_n, kSkipped);
  bool ordered = true, covered = true;
  for (i64 a = 0; a < tiles_m; ++a) {
    const Walk walk = m.visit(a * block_m, (a + 1) * block_m, block_n);
    ordered &= mark(walk, tiles_n, [&](i64 t, Tile tile) { forward[a * tiles_n + t] = tile; });
    covered &= splits_cover(walk, parts);
  }
  for (i64 b = 0; b < tiles_n; ++b) {
    const Walk walk = m.visit_queries(b * block_n, (b + 1) * block_n, block_m);
    ordered &= mark(walk, tiles_m, [&](i64 t, Tile tile) { transposed[t * tiles_n + b] = tile; });
    covered &= splits_cover(walk, parts);
  }
  expect(ordered, "order of tiles", m, block_m, block_n);
  expect(covered, "split()", m, block_m, block_n);

  bool right = true;
  for (i64 a = 0; a < tiles_m; ++a)
    for (i64 b = 0; b < tiles_n; ++b) {
      bool any = false, all = true;
      for (i64 i = a * block_m; i < min(m.seqlen_q, (a + 1) * block_m); ++i)
        for (i64 j = b * block_n; j < (b + 1) * block_n; ++j) {
          const bool seen = j < m.seqlen_k && visible(m, i, j);
          any |= seen;
          all &= seen;
        }
      right &= forward[a * tiles_n + b] == (!any ? kSkipped : all ? kFull : kPartial);
    }
  expect(right, "visit()", m, block_m, block_n);
  expect(forward == transposed, "visit_queries() against visit()", m, block_m, block_n);
}

// Tiles of a window that begin earlier by shift(): they hold the keys that rows see, each once, with the same fullness.
void check_shift(const Mask& m, i64 block_m, i64 block_n) {
  bool right = true;
  for (i64 first = 0; first < m.seqlen_q; first += block_m) {
    const i64 last = min(first + block_m, m.seqlen_q), shift = m.shift(first, first + block_m, block_n);
    if (shift == 0) continue;
    ++shifted;
    Mask longer = m;
    longer.seqlen_k += shift;
    const Walk walk = longer.visit(first, first + block_m, block_n);
    right &= shift < block_n && walk.run[1].begin * block_n - shift >= walk.run[0].end * block_n;
    right &= walk.run[1].end * block_n - shift == m.keys(last - 1).end;
    std::vector<char> seen(size_t(m.seqlen_k), 0);
    for (int r = 0; r < 2; ++r) {
      const Run& run = walk.run[r];
      for (i64 t = run.begin; t < run.end; ++t) {
        const i64 to = r ? shift : 0;  // from a key of the sequence to one of its tiles
        bool any = false, all = true;
        for (i64 j = t * block_n - to; j < (t + 1) * block_n - to; ++j)
          for (i64 i = first; i < last; ++i) {
            const bool pair = j < m.seqlen_k && visible(m, i, j);
            right &= longer.visible(i, j + to) == pair;
            any |= pair, all &= pair;
            if (j < m.seqlen_k) seen[size_t(j)] = 1;
          }
        right &= any && all == (t >= run.full_begin && t < run.full_end);
      }
    }
    for (i64 i = first; i < last; ++i)
      for (i64 j = 0; j < m.seqlen_k; ++j) right &= seen[size_t(j)] || !visible(m, i, j);
  }
  expect(right, "shift()", m, block_m, block_n);
}

// 32-bit masks against 64-bit ones, up to the longest lengths that they hold.
bool same(const Run& a, const Run32& b) {
  return a.begin == b.begin && a.full_begin == b.full_begin && a.full_end == b.full_end && a.end == b.end;
}
bool same(const Walk& a, const Walk32& b) { return same(a.run[0], b.run[0]) && same(a.run[1], b.run[1]); }

void check_narrow(std::mt19937& random) {
  const auto below = [&](i64 n) { return i32(random() % u64(n)); };
  // Of every magnitude, the largest included.
  const auto length = [&] { return below(8) ? below(i64(2) << below(29)) : kUnbounded32 - 1; };
  const auto window = [&] { return below(3) ? length() : below(2) ? kUnbounded : i64(random()) << below(20); };
  for (int n = 0; n < 300'000; ++n) {
    const Mask m = {length(), length(), window(), window(), window(), below(2) ? window() : -i64(random() >> 1)};
    const Mask32 m32 = narrow(m);
    const i32 block_m = 1 + below(256), block_n = 1 + below(256), row = below(m.seqlen_q + 1),
              key = below(m.seqlen_k + 1);
    const Walk walk = m.visit(row, row + block_m, block_n);
    const Walk32 walk32 = m32.visit(row, row + block_m, block_n);
    bool agree = same(walk, walk32) &&
                 same(m.visit_queries(key, key + block_n, block_m), m32.visit_queries(key, key + block_n, block_m));
    const i32 first = row + below(block_m), tiles = walk32.tiles(), part = 1 + below(tiles + 1);
    for (int r = 0; r < 2; ++r) {
      const i32 begin = walk32.run[r].begin, end = walk32.run[r].end;
      agree &= same(m.narrowed(begin, end, r == 1, first, row + block_m, block_n),
                    m32.narrowed(begin, end, r == 1, first, row + block_m, block_n));
    }
    agree &= m.shift(row, row + block_m, block_n) == m32.shift(row, row + block_m, block_n);
    agree &= same(split(walk, i64(part / 2), i64(part)), split(walk32, part / 2, part));
    if (row < m.seqlen_q) {
      const Keys keys = m.keys(row);
      const BasicKeys<i32> keys32 = m32.keys(row);
      agree &= keys.kept_end == keys32.kept_end && keys.begin == keys32.begin && keys.end == keys32.end;
      agree &= m.visible(row, key) == m32.visible(row, key);
    }
    expect(agree, "32-bit numbers", m, block_m, block_n);
  }
}

// Known answers of philox4x32-10, from the Random123 distribution's kat_vectors.
void check_philox() {
  const Philox4 zeros = philox4x32(0, 0, 0, 0, 0, 0);
  const Philox4 ones = philox4x32(~0u, ~0u, ~0u, ~0u, ~0u, ~0u);
  const u32 wanted[2][4] = {{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8},
                            {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}};
  bool right = true;
  for (int w = 0; w < 4; ++w) right &= zeros.word[w] == wanted[0][w] && ones.word[w] == wanted[1][w];
  expect(right, "philox4x32-10 known answers", {}, 0, 0);
}

void check_softmax(std::mt19937& random) {
  std::normal_distribution<float> normal(0.f, 4.f);
  for (int round = 0; round < 1000; ++round) {
    std::vector<float> scores(random() % 9);
    for (float& s : scores) s = random() % 5 ? normal(random) : kNegInfinity;
    const float sink = normal(random);
    RowState merged;
    double sum = 0.;
    for (float s : scores) {
      RowState one{s, s == kNegInfinity ? 0.f : 1.f};
      merge(merged, one);
      sum += std::exp(double(s));
    }
    const RowResult plain = finalize(merged, nullptr), sunk = finalize(merged, &sink);
    const bool empty = sum == 0.;
    expect(empty ? plain.lse == kInfinity && plain.scale == 0.f : std::abs(plain.lse - std::log(sum)) < 1e-5, "lse", {},
           0, 0);
    expect(std::abs(sunk.lse - std::log(sum + std::exp(double(sink)))) < 1e-5, "lse with a sink", {}, 0, 0);
  }
}

}  // namespace

// test_mask [PROBLEMS]
int main(int argc, char** argv) {
  const int problems = argc > 1 ? std::atoi(argv[1]) : 1'200'000;
  std::mt19937 random(2024);
  const auto below = [&](i64 n) { return i64(random() % u64(n)); };
  for (int n = 0; n < problems; ++n) {
    Mask m;
    m.seqlen_q = below(14);
    m.seqlen_k = below(14);
    m.left = below(4) ? below(10) : kUnbounded;
    m.right = below(4) ? (below(2) ? below(10) : 0) : kUnbounded;
    m.keep_first = below(3) ? below(8) : 0;
    m.full_from = below(3) ? kUnbounded : below(14);
    check(m, 1 + below(6), 1 + below(6), 1 + below(4));
    check_shift(m, 1 + below(6), 1 + below(6));
  }
  const bool all_ran = shifted * 20 > problems;
  all_ran ? ++passed : ++failed;
  if (!all_ran) std::printf("FAILED shift() moved tiles in %ld of %d problems only\n", shifted, problems);
  check_narrow(random);
  check_philox();
  check_softmax(random);
  std::printf("%ld passed, %ld failed\n", passed, failed);
  return failed != 0;
}
