// Few query rows against many keys, where reading K and V is the cost. Query heads that share a key head and a value
// head are a group, groups that are read together a bundle. An item is a bundle and one part of its walk over the keys:
// each key and value row is read once, in place, while the next ones are prefetched. A token's heads mostly lie beside
// one another, so that a bundle of all groups reads memory as it lies. Parts are merged in a fixed order.
#pragma once

#include <numeric>

#include "decode_rows.h"
#include "forward.h"

namespace strobe::cpu::STROBE_ISA {

constexpr i64 kDecodeMaxRows = 8;     // query rows of a sequence; beyond, packing K and V for gemm() pays
constexpr i64 kDecodeKeys = 64;       // a tile: K and V of it stay in the first two cache levels
constexpr i64 kDecodeStep = 16;       // keys whose rows of one head are read before those of the next head; where rows
constexpr i64 kDecodeWideRow = 1024;  // have fewer bytes than this, a tile's
constexpr i64 kMaxLines = i64(1) << 40;
// There are enough items for many cores, each with enough rows to outweigh its merge. Both follow from the problem
// alone, so that results do not depend on the machine.
constexpr i64 kDecodeItems = 64, kDecodeMinTiles = 8, kDecodeMaxTiles = 64;

inline bool decode_applies(const AttnParams& p) { return p.seqlen_q <= kDecodeMaxRows && p.dropout_p == 0.f; }

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

// Groups of query heads of one sequence, `per_group` heads each. Row r of a group is query row r % seqlen_q of its head
// number r / seqlen_q; the bundle's rows are those of its groups, one after another.
struct Bundle {
  const Head* heads;
  i64 groups, per_group, group_rows;
  const Head& head(i64 group) const { return heads[group * per_group]; }
  i64 n_heads() const { return groups * per_group; }
  i64 rows() const { return groups * group_rows; }
};

// What a bundle reads of each key: where its groups' heads lie, in elements, and the spans that Fetcher wants.
struct RowSpans {
  i64* offset;  // per group
  i64* span;
  i64 n_spans, bytes;

  template <class T>
  Fetcher fetcher(const T* const* rows, i64 n) const {
    return {reinterpret_cast<const char* const*>(rows), max<i64>(n, 0), span, n_spans, bytes};
  }
};

template <class HeadNumber>
RowSpans row_spans(Scratch& scratch, const Bundle& bundle, const Rows& rows, i64 dim, i64 size, HeadNumber number) {
  RowSpans r = {scratch.take<i64>(bundle.groups), scratch.take<i64>(bundle.groups), 0, dim * size};
  for (i64 g = 0; g < bundle.groups; ++g) {
    r.offset[g] = (number(bundle.head(g)) - number(bundle.head(0))) * rows.head_stride;
    if (g > 0 && r.offset[g] == r.offset[g - 1]) continue;
    if (g > 0 && rows.head_stride == dim)
      r.bytes += dim * size;
    else
      r.span[r.n_spans++] = r.offset[g] * size;
  }
  return r;
}

// Sets `part` to the rows' result over the keys of `walk`. E: what dot products multiply; T: the tensors' type.
template <class E, class T>
void decode_part(const AttnParams& p, const Bundle& bundle, const Walk& walk, const Partial& part) {
  const Head& first_head = bundle.heads[0];
  const SeqInfo& seq = first_head.seq;
  const Mask& mask = first_head.mask;
  const i64 d = p.head_dim, dv = p.head_dim_v, rows = bundle.rows(), group_rows = bundle.group_rows;
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
  const RowSpans k_spans = row_spans(scratch, bundle, p.k, d, sizeof(T), [](const Head& head) { return head.hk; });
  const RowSpans v_spans = row_spans(scratch, bundle, p.v, dv, sizeof(T), [](const Head& head) { return head.hv; });
  const i64 bytes = k_spans.n_spans * k_spans.bytes, step_keys = bytes < kDecodeWideRow ? kDecodeKeys : kDecodeStep;

  for (i64 r = 0; r < rows; ++r) {
    ones[r] = 1.f;
    const Head& head = bundle.heads[r / seq.seqlen_q];
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
    for (i64 step = 0; step < now.n; step += step_keys) {
      const i64 end = min(step + step_keys, n), next_step = step + step_keys;
      // The last step fetches the first values.
      Fetcher ahead = next_step < now.n ? k_spans.fetcher(k_now + next_step, min(step_keys, now.n - next_step))
                                        : v_spans.fetcher(v_now, min(step_keys, now.n));
      for (i64 g = 0; g < bundle.groups; ++g) {
        for_row_chunks(group_rows, [&](i64 r, auto count) __attribute__((always_inline)) {
          constexpr int kRows = decltype(count)::value, kKeys = kLanes / kRows;
          Fetcher* const fetcher = r == 0 ? &ahead : nullptr;
          r += g * group_rows;
          for (i64 key = step; key < end; key += kKeys)
            dot_block<kRows>(q + r * ldq, ldq, k_now + key, k_spans.offset[g], d, s + r * lds + key, lds, fetcher);
        });
      }
      ahead.fetch(kMaxLines);
    }
    for (i64 r = 0; r < rows; ++r) {
      const Head& head = bundle.heads[r / seq.seqlen_q];
      float* row = s + r * lds;
      const i64 i = r % seq.seqlen_q;
      if (!head.plain) score_row(head, row, i, now.first, n);
      if (now.partial) mask_row(mask, row, i, now.first, n);
      for (i64 c = now.n; c < n; ++c) row[c] = kNegInfinity;
      factor[r] = softmax_row(row, row, n, head.log2_scale, part.max[r], part.sum[r]);
    }
    for (i64 step = 0; step < now.n; step += step_keys) {
      const i64 keys = min(step_keys, now.n - step), next_step = step + step_keys;
      const float* scale = step == 0 ? factor : ones;
      Fetcher ahead = next_step < now.n ? v_spans.fetcher(v_now + next_step, min(step_keys, now.n - next_step))
                                        : k_spans.fetcher(k_next, min(step_keys, next.n));
      for (i64 g = 0; g < bundle.groups; ++g) {
        for_row_chunks(group_rows, [&](i64 r, auto count) __attribute__((always_inline)) {
          Fetcher* const fetcher = r == 0 ? &ahead : nullptr;
          r += g * group_rows;
          add_values_rows<decltype(count)::value>(s + r * lds + step, lds, v_now + step, keys, v_spans.offset[g], dv,
                                                  scale + r, part.o + r * ldo, ldo, fetcher);
        });
      }
      ahead.fetch(kMaxLines);
    }
    const T** done = k_now;
    k_now = k_next;
    k_next = done;
    now = next;
  }
}

template <class T>
void finish_bundle(const AttnParams& p, const Bundle& bundle, const Partial& part) {
  const i64 ldo = round_up(p.head_dim_v, kLanes), rows = bundle.heads[0].seq.seqlen_q;
  for (i64 n = 0; n < bundle.n_heads(); ++n) {
    const i64 r = n * rows;
    const Head& head = bundle.heads[n];
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
  if (p.batch == 0 || p.num_heads == 0) return;
  // Heads h of one group agree in h / (H / H_k) and in h / (H / H_v).
  const i64 per_group = std::gcd(p.num_heads / p.num_heads_k, p.num_heads / p.num_heads_v);
  const i64 groups = p.num_heads / per_group, ldo = round_up(p.head_dim_v, kLanes);
  const auto tiles_of = [&](i64 b) {
    const SeqInfo seq = SeqInfo::of(p, b);
    return mask_of(p, seq).visit(0, seq.seqlen_q, kDecodeKeys).tiles();
  };

  i64 tiles = 0, parts_in_all = 0;
  for (i64 b = 0; b < p.batch; ++b) tiles += tiles_of(b);
  const i64 part_tiles = max(ceil_div(kDecodeMinTiles, groups), min(kDecodeMaxTiles, tiles / kDecodeItems));
  const auto parts_of = [&](i64 b) { return max<i64>(1, ceil_div(tiles_of(b), part_tiles)); };
  for (i64 b = 0; b < p.batch; ++b) parts_in_all += parts_of(b);
  // All groups in one bundle, unless that leaves too few items.
  const i64 bundles = min(groups, ceil_div(kDecodeItems, parts_in_all));
  const auto first_group = [&](i64 bundle) { return groups * bundle / bundles; };

  Scratch scratch;  // the calling thread's: outlives the workers
  // Items of sequence b: [first[b], first[b + 1]), part by part of its first bundle, then of the next.
  i64* first = scratch.take<i64>(p.batch + 1);
  first[0] = 0;
  for (i64 b = 0; b < p.batch; ++b) first[b + 1] = first[b] + bundles * parts_of(b);
  const i64 items = first[p.batch];
  Partial* parts = scratch.take<Partial>(items);
  for (i64 b = 0; b < p.batch; ++b) {
    const i64 n_parts = (first[b + 1] - first[b]) / bundles, seqlen_q = SeqInfo::of(p, b).seqlen_q;
    if (n_parts == 1) continue;  // never leaves its worker
    for (i64 item = first[b]; item < first[b + 1]; ++item) {
      const i64 bundle = (item - first[b]) / n_parts;
      const i64 rows = (first_group(bundle + 1) - first_group(bundle)) * per_group * seqlen_q;
      parts[item] = {scratch.take<float>(rows * ldo), scratch.take<float>(rows), scratch.take<float>(rows)};
    }
  }

  const auto make_bundle = [&](Scratch& own, i64 b, i64 index) {
    const SeqInfo seq = SeqInfo::of(p, b);
    const Bundle bundle = {nullptr, first_group(index + 1) - first_group(index), per_group, per_group * seq.seqlen_q};
    Head* heads = own.take<Head>(bundle.n_heads());
    for (i64 n = 0; n < bundle.n_heads(); ++n) heads[n] = head_of(p, seq, first_group(index) * per_group + n);
    return Bundle{heads, bundle.groups, per_group, bundle.group_rows};
  };
  const auto clear = [&](const Partial& part, i64 rows) {
    __builtin_memset(part.o, 0, size_t(rows * ldo) * sizeof(float));
    for (i64 r = 0; r < rows; ++r) part.max[r] = kNegInfinity, part.sum[r] = 0.f;
  };
  const double cost = double(tiles * kDecodeKeys) * double(p.num_heads * p.seqlen_q * (p.head_dim + p.head_dim_v));
  parallel_items(executor, items, cost, [&](i64 item) {
    i64 b = 0;
    for (i64 last = p.batch; last - b > 1;) {
      const i64 middle = (b + last) / 2;
      (first[middle] <= item ? b : last) = middle;
    }
    const i64 n_parts = (first[b + 1] - first[b]) / bundles;
    Scratch own;
    const Bundle bundle = make_bundle(own, b, (item - first[b]) / n_parts);
    const Walk walk = bundle.heads[0].mask.visit(0, bundle.heads[0].seq.seqlen_q, kDecodeKeys);
    if (n_parts == 1) {
      const Partial part = take_partial(own, bundle.rows(), ldo);
      if (bundle.rows()) decode_part<E, T>(p, bundle, walk, part);
      return finish_bundle<T>(p, bundle, part);
    }
    const i64 index = (item - first[b]) % n_parts;
    clear(parts[item], bundle.rows());
    decode_part<E, T>(p, bundle, split(walk, index * part_tiles, (index + 1) * part_tiles), parts[item]);
  });
  if (items == p.batch * bundles) return;
  const double merge_cost = double(items) * double(p.num_heads / bundles * p.seqlen_q * ldo);
  parallel_items(executor, p.batch * bundles, merge_cost, [&](i64 n) {
    const i64 b = n / bundles, index = n % bundles, n_parts = (first[b + 1] - first[b]) / bundles;
    if (n_parts == 1) return;
    Scratch own;
    const Bundle bundle = make_bundle(own, b, index);
    const Partial* all = parts + first[b] + index * n_parts;
    for (i64 part = 1; part < n_parts; ++part) merge_parts(all[0], all[part], bundle.rows(), ldo);
    finish_bundle<T>(p, bundle, all[0]);
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
