// Few query rows against many keys, where reading K and V is the cost. An item is a group of query heads that share a
// key head and a value head, and one part of their walk over the keys: each key and value row is read once, in place,
// for all rows of the group, while the next ones are prefetched. Parts are merged in a fixed order.
#pragma once

#include "forward.h"

namespace strobe::cpu::STROBE_ISA {

constexpr i64 kDecodeMaxRows = 8;  // query rows of a sequence; beyond, packing K and V for gemm() pays
constexpr i64 kDecodeKeys = 64;    // a tile: K and V of it stay in the first two cache levels
constexpr i64 kDecodeStep = 16;    // keys between bursts of prefetches
// A part has enough keys to outweigh its merge, and there are enough parts for many cores. Both follow from the problem
// alone, so that results do not depend on the machine.
constexpr i64 kDecodeParts = 256, kDecodeMinTiles = 8, kDecodeMaxTiles = 128;

inline bool decode_applies(const AttnParams& p) { return p.seqlen_q <= kDecodeMaxRows && p.dropout_p == 0.f; }

// Lane n of the result is the sum of x[n]: each round adds two halves of every segment and packs two vectors into one.
STROBE_INLINE vf reduce_each(vf (&x)[kLanes]) {
#pragma GCC unroll 4
  for (int w = kLanes / 2; w; w /= 2) {
#if !defined(__clang__)
    vi low, high;
#pragma GCC unroll 16
    for (int n = 0; n < kLanes; ++n) {
      low[n] = n & w ? n - w + kLanes : n;
      high[n] = n & w ? n + kLanes : n + w;
    }
#endif
#pragma GCC unroll 8
    for (int n = 0; n < w; ++n) {
#if defined(__clang__)
      vf sum;
      for (int l = 0; l < kLanes; ++l) sum[l] = l & w ? x[n + w][l - w] + x[n + w][l] : x[n][l] + x[n][l + w];
      x[n] = sum;
#else
      x[n] = __builtin_shuffle(x[n], x[n + w], low) + __builtin_shuffle(x[n], x[n + w], high);
#endif
    }
  }
  return x[0];
}

// kLanes * kPair<E> elements as dot_step() takes them; of the first `left` only where there are fewer.
template <class E, class T>
STROBE_INLINE vf load_dot(const T* p) {
  if constexpr (kPair<E> == 2)
    return load(reinterpret_cast<const float*>(p));
  else
    return load(p);
}
template <class E, class T>
STROBE_INLINE vf load_dot(const T* p, i64 left) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  const u32 mask = (u32(1) << left) - 1;
  if constexpr (kPair<E> == 2) return vf(_mm512_maskz_loadu_epi16(mask, p));
  if constexpr (sizeof(T) == 4) return _mm512_maskz_loadu_ps(__mmask16(mask), p);
  if constexpr (__is_same(T, f16)) return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(__mmask16(mask), p));
  return vf(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(__mmask16(mask), p)), 16));
#else
  return load_units<E>(p, ceil_div(left, kPair<E>), left);
#endif
}
template <class E>
STROBE_INLINE vf dot_step(vf c, vf a, vf b) {
#if defined(STROBE_HAS_BF16)
  if constexpr (kPair<E> == 2) return _mm512_dpbf16_ps(c, __m512bh(a), __m512bh(b));
#endif
  return fma(a, b, c);
}

// s[r][n] = q[r] . k[n] for kRows rows and kLanes / kRows keys. q is padded with zeros to whole vectors.
template <int kRows, class E, class T>
STROBE_INLINE void dot_block(const E* q, i64 ldq, const T* const* k, i64 d, float* s, i64 lds) {
  constexpr int kKeys = kLanes / kRows;
  constexpr i64 kWidth = kLanes * kPair<E>;
  vf acc[kLanes] = {};
  const auto step = [&](i64 c, auto load_key) __attribute__((always_inline)) {
    vf row[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) row[r] = load_dot<E>(q + r * ldq + c);
#pragma GCC unroll 16
    for (int n = 0; n < kKeys; ++n) {
      const vf key = load_key(k[n] + c);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) acc[r * kKeys + n] = dot_step<E>(acc[r * kKeys + n], row[r], key);
    }
  };
  i64 c = 0;
  for (; c + kWidth <= d; c += kWidth)
    step(c, [](const T* p) __attribute__((always_inline)) { return load_dot<E>(p); });
  if (c < d) step(c, [&](const T* p) __attribute__((always_inline)) { return load_dot<E>(p, d - c); });
  float sums[kLanes];
  store(sums, reduce_each(acc));
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) __builtin_memcpy(s + r * lds, sums + r * kKeys, kKeys * sizeof(float));
}

// o[r] = o[r] * factor[r] + sum over n keys of p[r][j] * v[j], for kVectors vectors of columns; the last one has `tail`
// columns where kTail.
template <int kRows, int kVectors, bool kTail, class T>
STROBE_INLINE void add_values(const float* p, i64 ldp, const T* const* v, i64 n, i64 col, i64 tail, const float* factor,
                              float* o, i64 ldo) {
  vf acc[kRows][kVectors];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int x = 0; x < kVectors; ++x) acc[r][x] = load(o + r * ldo + col + x * kLanes) * factor[r];
  for (i64 j = 0; j < n; ++j) {
    const T* row = v[j] + col;
    vf weight[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) weight[r] = broadcast(p[r * ldp + j]);
#pragma GCC unroll 8
    for (int x = 0; x < kVectors; ++x) {
      const vf value = kTail ? load_dot<float>(row + x * kLanes, tail) : load(row + x * kLanes);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) acc[r][x] = fma(weight[r], value, acc[r][x]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int x = 0; x < kVectors; ++x) store(o + r * ldo + col + x * kLanes, acc[r][x]);
}

template <int kRows, class T>
void add_values_rows(const float* p, i64 ldp, const T* const* v, i64 n, i64 dv, const float* factor, float* o,
                     i64 ldo) {
  // Accumulators fit the registers with a row of V beside them.
  constexpr int kWide = kLanes == 16 ? (kRows == 4 ? 4 : 8) : (kRows == 4 ? 2 : 4);
  i64 c = 0;
  for (; c + kWide * kLanes <= dv; c += kWide * kLanes)
    add_values<kRows, kWide, false>(p, ldp, v, n, c, 0, factor, o, ldo);
  for (; c + kLanes <= dv; c += kLanes) add_values<kRows, 1, false>(p, ldp, v, n, c, 0, factor, o, ldo);
  if (c < dv) add_values<kRows, 1, true>(p, ldp, v, n, c, dv - c, factor, o, ldo);
}

// Calls f(first_row, kRows as a constant) in chunks of 4, 2 and 1 rows.
template <int kRows>
struct RowCount {
  static constexpr int value = kRows;
};
template <class F>
STROBE_INLINE void for_row_chunks(i64 rows, F f) {
  constexpr int kMost = kLanes < 4 ? kLanes : 4;
  i64 r = 0;
  for (; r + kMost <= rows; r += kMost) f(r, RowCount<kMost>());
  for (; r + 2 <= rows; r += 2) f(r, RowCount<2>());
  for (; r < rows; ++r) f(r, RowCount<1>());
}

template <class T>
STROBE_INLINE void prefetch_rows(const T* const* rows, i64 n, i64 dim) {
  for (i64 j = 0; j < n; ++j)
    for (i64 byte = 0; byte < dim * i64(sizeof(T)); byte += 64)
      __builtin_prefetch(reinterpret_cast<const char*>(rows[j]) + byte);
}

// Pointers to n keys from `first` on. Keys of a page, or of a tensor without pages, lie one stride apart.
template <class T>
void key_rows(const SeqInfo& seq, const Rows& rows, i64 h, i64 first, i64 n, const T** out) {
  const T* data = static_cast<const T*>(rows.data);
  for (i64 j = 0; j < n;) {
    const T* row = data + seq.k_index(rows, first + j, h);
    const i64 end = seq.pages ? min(n, j + seq.page_size - (first + j + seq.leftpad) % seq.page_size) : n;
    for (; j < end; ++j, row += rows.row_stride) out[j] = row;
  }
}

// The keys of a tile that some row sees.
struct TileKeys {
  i64 first, n;
  bool partial;  // some row does not see all of them
};

inline TileKeys tile_keys(const Mask& mask, const Run& run, i64 tile) {
  const i64 begin = tile * kDecodeKeys;
  if (tile >= run.full_begin && tile < run.full_end) return {begin, kDecodeKeys, false};
  const i64 end = min(begin + kDecodeKeys, mask.seqlen_k);
  i64 lo = end, hi = begin;
  for (i64 i = 0; i < mask.seqlen_q; ++i) {
    const Keys keys = mask.keys(i);
    const auto add = [&](i64 first, i64 last) {
      first = max(first, begin), last = min(last, end);
      if (first < last) lo = min(lo, first), hi = max(hi, last);
    };
    add(0, keys.kept_end);
    add(keys.begin, keys.end);
  }
  return {lo, max<i64>(0, hi - lo), true};
}

// A group of query heads that share hk and hv, in one sequence. Row r is query row r % seqlen_q of its head number
// r / seqlen_q.
struct Group {
  const Head* heads;
  i64 n_heads, rows;
};

// Sets `part` to the rows' result over the keys of `walk`. E: what dot products multiply; T: the tensors' type.
template <class E, class T>
void decode_part(const AttnParams& p, const Group& group, const Walk& walk, const Partial& part) {
  const Head& first_head = group.heads[0];
  const SeqInfo& seq = first_head.seq;
  const Mask& mask = first_head.mask;
  const i64 d = p.head_dim, dv = p.head_dim_v, rows = group.rows;
  const i64 ldq = round_up(d, kLanes * kPair<E>), ldo = round_up(dv, kLanes), lds = kDecodeKeys;
  Scratch scratch;
  E* q = scratch.take<E>(rows * ldq);
  float* s = scratch.take<float>(rows * lds);
  float* factor = scratch.take<float>(rows);
  float* ones = scratch.take<float>(rows);
  const T** q_rows = scratch.take<const T*>(rows);
  const T** k_now = scratch.take<const T*>(kDecodeKeys);
  const T** k_next = scratch.take<const T*>(kDecodeKeys);
  const T** v_now = scratch.take<const T*>(kDecodeKeys);

  for (i64 r = 0; r < rows; ++r) {
    ones[r] = 1.f;
    const Head& head = group.heads[r / seq.seqlen_q];
    q_rows[r] = static_cast<const T*>(p.q.data) + seq.q_index(p.q, r % seq.seqlen_q, head.h);
  }
  pack_rows(q, ldq, q_rows, rows, d, ldq);

  // One tile ahead, for the prefetches.
  int run = 0;
  i64 tile = walk.run[0].begin;
  const auto next_tile = [&](const T** pointers) {
    for (; run < 2; tile = ++run < 2 ? walk.run[run].begin : 0) {
      while (tile < walk.run[run].end) {
        const TileKeys keys = tile_keys(mask, walk.run[run], tile++);
        if (keys.n == 0) continue;
        key_rows(seq, p.k, first_head.hk, keys.first, keys.n, pointers);
        // Whole vectors of scores: the last key stands in for those that are missing.
        for (i64 j = keys.n; j < round_up(keys.n, kLanes); ++j) pointers[j] = pointers[keys.n - 1];
        return keys;
      }
    }
    return TileKeys{0, 0, false};
  };

  TileKeys now = next_tile(k_now);
  while (now.n > 0) {
    const TileKeys next = next_tile(k_next);
    key_rows(seq, p.v, first_head.hv, now.first, now.n, v_now);
    const i64 n = round_up(now.n, kLanes);
    for (i64 j = 0; j < n; j += kLanes) {
      prefetch_rows(v_now + j, min<i64>(kLanes, now.n - j), dv);
      for_row_chunks(rows, [&](i64 r, auto count) __attribute__((always_inline)) {
        constexpr int kRows = decltype(count)::value, kKeys = kLanes / kRows;
        for (i64 key = j; key < j + kLanes; key += kKeys)
          dot_block<kRows>(q + r * ldq, ldq, k_now + key, d, s + r * lds + key, lds);
      });
    }
    for (i64 r = 0; r < rows; ++r) {
      const Head& head = group.heads[r / seq.seqlen_q];
      float* row = s + r * lds;
      const i64 i = r % seq.seqlen_q;
      if (!head.plain) score_row(head, row, i, now.first, n);
      if (now.partial) mask_row(mask, row, i, now.first, n);
      for (i64 c = now.n; c < n; ++c) row[c] = kNegInfinity;
      factor[r] = softmax_row(row, row, n, head.log2_scale, part.max[r], part.sum[r]);
    }
    for (i64 j = 0; j < now.n; j += kDecodeStep) {
      if (j < next.n) prefetch_rows(k_next + j, min(kDecodeStep, next.n - j), d);
      const i64 keys = min(kDecodeStep, now.n - j);
      const float* scale = j == 0 ? factor : ones;
      for_row_chunks(rows, [&](i64 r, auto count) __attribute__((always_inline)) {
        add_values_rows<decltype(count)::value>(s + r * lds + j, lds, v_now + j, keys, dv, scale + r, part.o + r * ldo,
                                                ldo);
      });
    }
    const T** done = k_now;
    k_now = k_next;
    k_next = done;
    now = next;
  }
}

template <class T>
void finish_group(const AttnParams& p, const Group& group, const Partial& part) {
  const i64 ldo = round_up(p.head_dim_v, kLanes), rows = group.heads[0].seq.seqlen_q;
  for (i64 n = 0; n < group.n_heads; ++n) {
    const i64 r = n * rows;
    const Head& head = group.heads[n];
    finish<T>(p, head, 0, rows, {part.o + r * ldo, part.max + r, part.sum + r});
    for (i64 i = rows; i < head.seq.rows_q; ++i) write_row<T>(p, head, i, nullptr, {0.f, kInfinity});
  }
}

// Adds part b to part a.
inline void merge_parts(const Partial& a, const Partial& b, i64 rows, i64 ldo) {
  for (i64 r = 0; r < rows; ++r) {
    RowState state = {a.max[r] * kLn2, a.sum[r]};
    const MergeFactors factors = merge(state, {b.max[r] * kLn2, b.sum[r]});
    a.max[r] = b.max[r] > a.max[r] ? b.max[r] : a.max[r];
    a.sum[r] = state.sum;
    for (i64 c = r * ldo; c < (r + 1) * ldo; c += kLanes)
      store(a.o + c, load(a.o + c) * factors.a + load(b.o + c) * factors.b);
  }
}

template <class E, class T>
void decode_typed(const AttnParams& p, const strobe_executor& executor) {
  // Heads h of one group agree in h / (H / H_k) and in h / (H / H_v).
  i64 n_heads = p.num_heads / p.num_heads_k;
  for (i64 other = p.num_heads / p.num_heads_v; other;) {
    const i64 rest = n_heads % other;
    n_heads = other;
    other = rest;
  }
  const i64 groups = p.num_heads / n_heads, ldo = round_up(p.head_dim_v, kLanes);
  const auto walk_of = [&](const SeqInfo& seq) { return mask_of(p, seq).visit(0, seq.seqlen_q, kDecodeKeys); };

  i64 tiles = 0;
  for (i64 b = 0; b < p.batch; ++b) tiles += groups * walk_of(SeqInfo::of(p, b)).tiles();
  const i64 part_tiles = max(kDecodeMinTiles, min(kDecodeMaxTiles, tiles / kDecodeParts));
  Scratch scratch;  // the calling thread's: outlives the workers
  // Items of sequence b: [first[b], first[b + 1]), part by part of its first group, then of the next.
  i64* first = scratch.take<i64>(p.batch + 1);
  first[0] = 0;
  for (i64 b = 0; b < p.batch; ++b)
    first[b + 1] = first[b] + groups * max<i64>(1, ceil_div(walk_of(SeqInfo::of(p, b)).tiles(), part_tiles));
  const i64 items = first[p.batch];
  Partial* parts = scratch.take<Partial>(items);
  for (i64 b = 0; b < p.batch; ++b) {
    if (first[b + 1] - first[b] == groups) continue;  // in one part: never leaves its worker
    const i64 rows = n_heads * SeqInfo::of(p, b).seqlen_q;
    for (i64 item = first[b]; item < first[b + 1]; ++item)
      parts[item] = {scratch.take<float>(rows * ldo), scratch.take<float>(rows), scratch.take<float>(rows)};
  }

  const auto make_group = [&](Scratch& own, i64 b, i64 g) {
    const SeqInfo seq = SeqInfo::of(p, b);
    Head* heads = own.take<Head>(n_heads);
    for (i64 n = 0; n < n_heads; ++n) heads[n] = head_of(p, seq, g * n_heads + n);
    return Group{heads, n_heads, n_heads * seq.seqlen_q};
  };
  const auto clear = [&](const Partial& part, i64 rows) {
    __builtin_memset(part.o, 0, size_t(rows * ldo) * sizeof(float));
    for (i64 r = 0; r < rows; ++r) part.max[r] = kNegInfinity, part.sum[r] = 0.f;
  };
  const double cost = double(tiles * kDecodeKeys * n_heads) * double(p.seqlen_q * (p.head_dim + p.head_dim_v));
  parallel_items(executor, items, cost, [&](i64 item) {
    i64 b = 0;
    for (i64 last = p.batch; last - b > 1;) {
      const i64 middle = (b + last) / 2;
      (first[middle] <= item ? b : last) = middle;
    }
    const i64 n_parts = (first[b + 1] - first[b]) / groups, g = (item - first[b]) / n_parts;
    Scratch own;
    const Group group = make_group(own, b, g);
    if (n_parts == 1) {
      const Partial part = take_partial(own, group.rows, ldo);
      if (group.rows) decode_part<E, T>(p, group, walk_of(group.heads[0].seq), part);
      return finish_group<T>(p, group, part);
    }
    const i64 index = (item - first[b]) % n_parts;
    clear(parts[item], group.rows);
    decode_part<E, T>(p, group, split(walk_of(group.heads[0].seq), index * part_tiles, (index + 1) * part_tiles),
                      parts[item]);
  });
  if (items == p.batch * groups) return;
  const double merge_cost = double(items) * double(n_heads * p.seqlen_q * ldo);
  parallel_items(executor, p.batch * groups, merge_cost, [&](i64 n) {
    const i64 b = n / groups, g = n % groups, n_parts = (first[b + 1] - first[b]) / groups;
    if (n_parts == 1) return;
    Scratch own;
    const Group group = make_group(own, b, g);
    const Partial* all = parts + first[b] + g * n_parts;
    for (i64 part = 1; part < n_parts; ++part) merge_parts(all[0], all[part], group.rows, ldo);
    finish_group<T>(p, group, all[0]);
  });
}

inline void decode(const AttnParams& p, const strobe_executor& executor) {
  switch (p.dtype) {
    case DType::f32:
      return decode_typed<float, float>(p, executor);
    case DType::f16:
      return decode_typed<float, f16>(p, executor);
#if defined(STROBE_HAS_BF16)
    case DType::bf16:
      return decode_typed<bf16, bf16>(p, executor);
#else
    case DType::bf16:
      return decode_typed<float, bf16>(p, executor);
#endif
  }
}

}  // namespace strobe::cpu::STROBE_ISA
