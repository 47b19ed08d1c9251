// One tile of the backward pass, transposed: rows are keys and columns are queries, so that LSE and delta are vectors
// and P^T and dS^T are already what dV = P^T dO and dK = dS^T Q multiply from the left.
#pragma once

#include "forward.h"

namespace strobe::cpu::STROBE_ISA {

constexpr i64 kQueryTile = 64;  // whole register tiles, whole dropout blocks

// Up to kQueryTile rows of one head, packed. Columns rows .. cols - 1 are padding; their probabilities are 0.
template <class E>
struct QueryTile {
  i64 row0, rows, cols;  // cols = round_up(rows, kLanes)
  E *q_t, *dout_t;       // B operands of the transposes
  E *q, *dout;           // B operands of the rows as they are
  float *shift, *delta;  // -LSE in units of log2, -inf for empty rows; rowsum(dO * O) - dlse
  i64 ld_q, ld_dout;
};

// Rows are keys of the block, columns the queries of a tile; the leading dimension is kQueryTile.
template <class E>
struct TileScores {
  float *s, *dp;  // K Q^T and V dO^T
  E *p, *ds;      // dropped P^T and dS^T / scale as A operands
  E* ds_b;        // dS^T / scale as B operand
  float* kept;    // 0 or 1 / (1 - dropout_p)
};

template <class E>
TileScores<E> take_scores(Scratch& scratch, i64 keys, bool drops) {
  const i64 n = round_up(keys, 2) * kQueryTile;
  TileScores<E> t;
  t.s = scratch.take<float>(n);
  t.dp = scratch.take<float>(n);
  if constexpr (kPair<E> == 1) {
    t.p = t.s;
    t.ds = t.ds_b = t.dp;
  } else {
    t.p = scratch.take<E>(n);
    t.ds = scratch.take<E>(n);
    t.ds_b = scratch.take<E>(n);
  }
  t.kept = drops ? scratch.take<float>(round_up(keys, 16) * kQueryTile) : nullptr;
  return t;
}

template <class E>
QueryTile<E> take_query_tile(Scratch& scratch, i64 d, i64 dv) {
  QueryTile<E> t;
  t.ld_q = round_up(d, kLanes);
  t.ld_dout = round_up(dv, kLanes);
  t.q_t = scratch.take<E>(round_up(d, kPair<E>) * kQueryTile);
  t.dout_t = scratch.take<E>(round_up(dv, kPair<E>) * kQueryTile);
  t.q = scratch.take<E>(kQueryTile * t.ld_q);
  t.dout = scratch.take<E>(kQueryTile * t.ld_dout);
  t.shift = scratch.take<float>(kQueryTile);
  t.delta = scratch.take<float>(kQueryTile);
  return t;
}

// `delta` belongs to row0.
template <class E, class T>
void pack_queries(const BackwardParams& b, const Head& head, i64 row0, i64 rows, const float* delta, QueryTile<E>& t) {
  const AttnParams& p = b.fwd;
  const T* pointer[kQueryTile] = {};
  const T* data = static_cast<const T*>(p.q.data);
  for (i64 r = 0; r < rows; ++r) pointer[r] = data + head.seq.q_index(p.q, row0 + r, head.h);
  pack_transposed(t.q_t, kQueryTile, pointer, rows, p.head_dim);
  pack_natural(t.q, t.ld_q, pointer, rows, p.head_dim);
  data = static_cast<const T*>(b.dout.data);
  for (i64 r = 0; r < rows; ++r) pointer[r] = data + head.seq.q_index(b.dout, row0 + r, head.h);
  pack_transposed(t.dout_t, kQueryTile, pointer, rows, p.head_dim_v);
  pack_natural(t.dout, t.ld_dout, pointer, rows, p.head_dim_v);

  t.row0 = row0;
  t.rows = rows;
  t.cols = round_up(rows, kLanes);
  const float* lse = p.lse + head.seq.lse_index(p, row0, head.h);
  for (i64 r = 0; r < rows; ++r) {
    t.shift[r] = -lse[r] * kLog2e;
    t.delta[r] = delta[r];
  }
  for (i64 r = rows; r < t.cols; ++r) {
    t.shift[r] = kNegInfinity;
    t.delta[r] = 0.f;
  }
}

// Dropout of keys [key0, key0 + keys) by the tile's queries, in whole blocks of 16 x 16.
inline void draw_tile(const Head& head, float keep_scale, i64 row0, i64 cols, i64 key0, i64 keys, float* kept) {
  for (i64 c = 0; c < keys; c += 16)
    for (i64 r = 0; r < cols; r += 16) {
      u32 word[4][32];
      for (i32 lane = 0; lane < 32; ++lane) {
        const Philox4 draw = head.dropout.lane((row0 + r) / 16, (key0 + c) / 16, head.bh, lane);
        for (int w = 0; w < 4; ++w) word[w][lane] = draw.word[w];
      }
      for (int w = 0; w < 4; ++w)
        for (i32 lane = 0; lane < 32; ++lane) {
          float* to = kept + (c + w / 2 * 8 + lane % 4 * 2) * kQueryTile + r + w % 2 * 8 + lane / 4;
          to[0] = (word[w][lane] & 0xFFFFu) < head.dropout.threshold ? keep_scale : 0.f;
          to[kQueryTile] = (word[w][lane] >> 16) < head.dropout.threshold ? keep_scale : 0.f;
        }
    }
}

struct Gradient {
  vf p, ds;
};

// The columns of a tile that see a key: [begin, end) and [full_begin, full_end).
struct SeenColumns {
  i32 begin, end, full_begin, full_end;
};
inline SeenColumns seen_columns(const Mask& mask, i64 j, i64 row0) {
  const Queries q = mask.queries(j);
  const auto column = [&](i64 i) { return i32(max<i64>(0, min<i64>(i - row0, kQueryTile))); };
  return {column(q.begin), column(q.end), column(q.full_begin), column(q.full_end)};
}

// Of key j and queries i .. i + kLanes - 1, which are columns x and following of the tile. What kPlain leaves out:
// softcap, ALiBi, dropout and masks.
template <bool kPlain>
STROBE_INLINE Gradient gradient_of(const Head& head, vf s, vf dp, vf shift, vf delta, const float* kept,
                                   const SeenColumns* seen, i64 i, i64 j, i64 x) {
  if constexpr (kPlain) {
    const vf p = exp2(fma(s, broadcast(head.log2_scale), shift));
    return {p, p * (dp - delta)};
  } else {
    vi lane;
    for (int n = 0; n < kLanes; ++n) lane[n] = n;
    vf score = s * head.score.scale, slope = broadcast(1.f);
    if (head.score.softcap != 0.f) {
      const vf t = tanh(score / head.score.softcap);
      score = head.score.softcap * t;
      slope = 1.f - t * t;
    }
    if (head.score.alibi_slope != 0.f) {
      const vf distance = __builtin_convertvector(lane + i32(i + head.mask.off() - j), vf);
      score -= head.score.alibi_slope * (distance < 0.f ? -distance : distance);
    }
    vf p = exp2(fma(score, broadcast(kLog2e), shift));
    if (seen) {
      const vi column = lane + i32(x);
      const vi visible =
          ((column >= seen->begin) & (column < seen->end)) | ((column >= seen->full_begin) & (column < seen->full_end));
      p = select(visible, p, zero());
      dp = select(visible, dp, delta);  // what lies behind the mask may be infinite
    }
    if (!kept) return {p, p * (dp - delta) * slope};
    const vf keep = load(kept);
    return {p * keep, p * (dp * keep - delta) * slope};
  }
}

#if defined(STROBE_HAS_BF16)
// Two rows as an A operand, and, where `pairs` is given, as a B operand.
STROBE_INLINE void store_pair(bf16* rows, i64 ld, bf16* pairs, vf even, vf odd) {
  const __m512i both = __m512i(_mm512_cvtne2ps_pbh(odd, even));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(rows), _mm512_castsi512_si256(both));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(rows + ld), _mm512_extracti64x4_epi64(both, 1));
  if (!pairs) return;
  const __m512i interleaved = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                                               6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  _mm512_storeu_si512(pairs, _mm512_permutexvar_epi16(interleaved, both));
}
#endif

// P^T and dS^T of keys [first, last) of the block that starts at key0; `first` is even. Odd counts of keys are padded
// with a row of zeros where E is bf16.
template <bool kPlain, class E>
void gradient_tile(const Head& head, const QueryTile<E>& q, i64 key0, i64 first, i64 last, bool masked,
                   const TileScores<E>& t) {
  SeenColumns seen[kPair<E>];
  for (i64 c = first; c < last; c += kPair<E>) {
    if (!kPlain && masked)
      for (i64 n = 0; n < kPair<E>; ++n) seen[n] = seen_columns(head.mask, key0 + c + n, q.row0);
    const i64 at = c * kQueryTile;
    for (i64 x = 0; x < q.cols; x += kLanes) {
      const vf shift = load(q.shift + x), delta = load(q.delta + x);
      const auto gradient = [&](i64 n) __attribute__((always_inline)) {
        const i64 e = at + n * kQueryTile + x;
        return gradient_of<kPlain>(head, load(t.s + e), load(t.dp + e), shift, delta, t.kept ? t.kept + e : nullptr,
                                   masked ? seen + n : nullptr, q.row0 + x, key0 + c + n, x);
      };
      const Gradient even = gradient(0);
      if constexpr (kPair<E> == 1) {
        store(t.p + at + x, even.p);
        store(t.ds + at + x, even.ds);
      } else {
#if defined(STROBE_HAS_BF16)
        const Gradient odd = c + 1 < last ? gradient(1) : Gradient{zero(), zero()};
        store_pair(t.p + at + x, kQueryTile, nullptr, even.p, odd.p);
        store_pair(t.ds + at + x, kQueryTile, t.ds_b + at + 2 * x, even.ds, odd.ds);
#endif
      }
    }
  }
}

// The hull of the block's keys that rows [row0, row0 + rows) see; kept tokens and a far window need few of them.
struct KeySpan {
  i64 first, last;
};
inline KeySpan seen_keys(const Mask& mask, i64 row0, i64 rows, i64 key0, i64 keys) {
  i64 first = keys, last = 0;
  const auto join = [&](i64 begin, i64 end) {
    begin = max<i64>(begin - key0, 0);
    end = min<i64>(end - key0, keys);
    if (begin >= end) return;
    first = min(first, begin);
    last = max(last, end);
  };
  for (i64 r = 0; r < rows; ++r) {
    const Keys k = mask.keys(row0 + r);
    join(0, k.kept_end);
    join(k.begin, k.end);
  }
  if (first >= last) return {0, 0};
  return {first / 16 * 16, last};  // whole dropout blocks
}

// to = from * scale, or to += that.
template <bool kAdd = false, class T>
STROBE_INLINE void write_scaled(T* to, const float* from, i64 n, float scale) {
  i64 c = 0;
  for (; c + kLanes <= n; c += kLanes) {
    const vf x = load(from + c) * scale;
    store(to + c, kAdd ? load(to + c) + x : x);
  }
  if (c < n) {
    const vf x = load_first(from + c, n - c) * scale;
    store_first(to + c, kAdd ? load_first(to + c, n - c) + x : x, n - c);
  }
}

// Rows of dq from dQ^T [d x kQueryTile].
template <class T>
void write_transposed(T* const* rows, i64 n_rows, const float* from, i64 d, float scale) {
  for (i64 r = 0; r < n_rows; r += kLanes)
    for (i64 c = 0; c < d; c += kLanes) {
      const i64 n = min<i64>(kLanes, d - c);
      vf x[kLanes];
#pragma GCC unroll 16
      for (int k = 0; k < kLanes; ++k) x[k] = k < n ? load(from + (c + k) * kQueryTile + r) * scale : zero();
      transpose(x);
      for (i64 k = 0; k < min<i64>(kLanes, n_rows - r); ++k)
        n == kLanes ? store(rows[r + k] + c, x[k]) : store_first(rows[r + k] + c, x[k], n);
    }
}

}  // namespace strobe::cpu::STROBE_ISA
