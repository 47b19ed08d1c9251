// Forward: FlashAttention-2's loop (Dao, arXiv 2307.08691). An item is a block of query rows of one head; it walks the
// key tiles that the mask gives, packs K^T and V of each, and keeps a running softmax in units of log2.
#pragma once

#include "core/philox.h"
#include "core/score.h"
#include "core/seqlen.h"
#include "core/softmax.h"
#include "exp.h"
#include "gemm.h"
#include "parallel.h"
#include "scratch.h"

namespace strobe::cpu::STROBE_ISA {

constexpr i64 kBlockM = 192;  // query rows: whole register tiles, whole dropout blocks
constexpr i64 kBlockN = 128;  // keys

// Everything about one head of one sequence that does not change within an item.
struct Head {
  SeqInfo seq;
  Mask mask;
  Score score;
  Dropout dropout;
  i64 h, hk, hv, bh;
  bool plain;  // the score is scale * qk, with a positive scale
  bool drops;
  float log2_scale;  // what a score in S is still to be multiplied by
};

inline Head head_of(const AttnParams& p, const SeqInfo& seq, i64 h) {
  Head head;
  head.seq = seq;
  head.mask = mask_of(p, seq);
  head.score = {p.scale, p.softcap, p.alibi_slopes ? p.alibi_slopes[seq.batch * p.alibi_batch_stride + h] : 0.f};
  head.dropout = {p.seed, p.offset, keep_threshold(p.dropout_p)};
  head.h = h;
  head.hk = h / (p.num_heads / p.num_heads_k);
  head.hv = h / (p.num_heads / p.num_heads_v);
  head.bh = seq.batch * p.num_heads + h;
  head.plain = head.score.softcap == 0.f && head.score.alibi_slope == 0.f && p.scale > 0.f;
  head.drops = p.dropout_p > 0.f;
  head.log2_scale = head.plain ? p.scale * kLog2e : 1.f;
  return head;
}

// S = log2(e) * score, where that is more than a scale. Columns are keys first .. first + n - 1.
inline void score_row(const Head& head, float* s, i64 i, i64 first, i64 n) {
  const float softcap = head.score.softcap, slope = head.score.alibi_slope;
  vf lane;
  for (int k = 0; k < kLanes; ++k) lane[k] = float(k);
  const i64 distance = i + head.mask.off() - first;
  for (i64 c = 0; c < n; c += kLanes) {
    vf x = load(s + c) * head.score.scale;
    if (softcap != 0.f) x = softcap * tanh(x / softcap);
    if (slope != 0.f) {
      const vf d = float(distance - c) - lane;
      x -= slope * (d < 0.f ? -d : d);
    }
    store(s + c, x * kLog2e);
  }
}

// -inf where row i does not see the key, and from `n` on.
inline void mask_row(const Mask& mask, float* s, i64 i, i64 first, i64 n) {
  const Keys keys = mask.keys(i);
  const auto clear = [&](i64 begin, i64 end) {
    begin = max<i64>(begin - first, 0);
    end = min<i64>(end - first, n);
    for (i64 c = begin; c < end; ++c) s[c] = kNegInfinity;
  };
  clear(keys.kept_end, keys.begin);
  clear(keys.end, first + n);
}

// Zeroes the dropped probabilities of rows x cols of P, whose first element is (i, j), both multiples of 16.
template <class E>
void drop_block(const Head& head, E* p, i64 ld, i64 i, i64 j, i64 rows, i64 cols) {
  for (i64 r = 0; r < rows; r += 16)
    for (i64 c = 0; c < cols; c += 16)
      for (i32 lane = 0; lane < 32; ++lane) {
        const Philox4 draw = head.dropout.lane((i + r) / 16, (j + c) / 16, head.bh, lane);
        for (int e = 0; e < 8; ++e) {
          const i64 row = r + lane / 4 + e % 2 * 8, col = c + lane % 4 * 2 + e / 4 * 8 + e / 2 % 2;
          const u32 word = draw.word[e / 4 * 2 + e % 2];
          const u32 bits = e / 2 % 2 ? word >> 16 : word & 0xFFFFu;
          if (bits >= head.dropout.threshold && row < rows && col < cols) p[row * ld + col] = E{};
        }
      }
}

// One row of S to P = 2^(s - max), and its running state. Returns the factor that earlier sums and outputs need.
template <class E>
STROBE_INLINE float softmax_row(const float* s, E* p, i64 n, float log2_scale, float& row_max, float& row_sum) {
  vf m = broadcast(kNegInfinity);
  for (i64 c = 0; c < n; c += kLanes) m = max(m, load(s + c));
  const float old = row_max, seen = reduce_max(m) * log2_scale;
  // max() would drop a NaN score; the sum below still carries it.
  const float now = seen > old ? seen : old;
  const vf shift = broadcast(-shift_of(now)), scale = broadcast(log2_scale);
  vf sum = zero();
  for (i64 c = 0; c < n; c += kLanes) {
    const vf e = exp2(fma(load(s + c), scale, shift));
    sum += e;
    store(p + c, e);
  }
  const float factor = now == old ? 1.f : old == kNegInfinity ? 0.f : exp2(broadcast(old - now))[0];
  row_max = now;
  row_sum = row_sum * factor + reduce_add(sum);
  return factor;
}

template <class T>
void write_row(const AttnParams& p, const Head& head, i64 i, const float* o, const RowResult& result) {
  T* out = static_cast<T*>(p.out.data) + head.seq.q_index(p.out, i, head.h);
  const i64 dv = p.head_dim_v;
  for (i64 c = 0; c < dv; c += kLanes) {
    // A row that saw nothing is 0 whatever lies in o.
    const vf x = result.scale == 0.f ? zero() : load(o + c) * result.scale;
    if (c + kLanes <= dv)
      store(out + c, x);
    else
      store_first(out + c, x, dv - c);
  }
  if (p.lse) p.lse[head.seq.lse_index(p, i, head.h)] = result.lse;
}

// Pads a leading dimension so that rows of a panel do not fall into the same cache sets.
STROBE_INLINE i64 spread(i64 cols) { return cols >= 128 ? cols + kLanes : cols; }

// Rows on the way: unnormalised output [rows, round_up(head_dim_v, kLanes)], maximum in units of log2, sum.
struct Partial {
  float *o, *max, *sum;
};

inline Partial take_partial(Scratch& scratch, i64 rows, i64 d_n) {
  const Partial part = {scratch.take<float>(rows * d_n), scratch.take<float>(rows), scratch.take<float>(rows)};
  __builtin_memset(part.o, 0, size_t(rows * d_n) * sizeof(float));
  for (i64 r = 0; r < rows; ++r) part.max[r] = kNegInfinity, part.sum[r] = 0.f;
  return part;
}

// Adds the keys of `walk` to the rows. E: what gemm() multiplies; T: the tensors' type.
template <class E, class T>
void attend(const AttnParams& p, const Head& head, i64 row0, i64 rows, const Walk& walk, const Partial& part) {
  const i64 d = p.head_dim, dv = p.head_dim_v;
  const i64 d_k = round_up(d, kPair<E>), d_n = round_up(dv, kLanes);
  const i64 ldk = spread(kBlockN), ldv = spread(d_n), lds = kBlockN + kLanes;
  Scratch scratch;
  E* q = scratch.take<E>(rows * d_k);
  E* kt = scratch.take<E>(d_k * ldk);
  E* v = scratch.take<E>(kBlockN * ldv);
  float* s = scratch.take<float>(rows * lds);
  E* prob = sizeof(E) == sizeof(float) ? reinterpret_cast<E*>(s) : scratch.take<E>(rows * lds);
  float *const o = part.o, *const row_max = part.max, *const row_sum = part.sum;
  const T** pointer = scratch.take<const T*>(max(kBlockM, kBlockN));

  const T* q_data = static_cast<const T*>(p.q.data);
  for (i64 r = 0; r < rows; ++r) pointer[r] = q_data + head.seq.q_index(p.q, row0 + r, head.h);
  pack_rows(q, d_k, pointer, rows, d, d_k);
  for (const Run& run : walk.run) {
    for (i64 tile = run.begin; tile < run.end; ++tile) {
      const i64 key0 = tile * kBlockN;
      i64 keys = min<i64>(kBlockN, head.mask.seqlen_k - key0);
      const bool partial = tile < run.full_begin || tile >= run.full_end;
      // Rows [r0, r1) and the first `keys` keys of the tile hold everything visible in it.
      i64 r0 = 0, r1 = rows, n = round_up(keys, kLanes);
      if (partial) {
        const auto sees = [&](i64 r) {
          const Keys k = head.mask.keys(row0 + r);
          return k.kept_end > key0 || (k.end > key0 && k.begin < key0 + keys && k.begin < k.end);
        };
        while (r0 < r1 && !sees(r0)) ++r0;
        while (r0 < r1 && !sees(r1 - 1)) --r1;
        if (r0 == r1) continue;
        i64 key_end = key0;
        for (i64 r = r0; r < r1; ++r) {
          const Keys k = head.mask.keys(row0 + r);
          key_end = max(key_end, k.begin < min(k.end, key0 + keys) ? k.end : k.kept_end);
        }
        keys = min(keys, key_end - key0);
        n = round_up(keys, kLanes);
        if (head.drops) r0 = r0 / 16 * 16;
      }
      const i64 count = r1 - r0;

      const T* k_data = static_cast<const T*>(p.k.data);
      for (i64 c = 0; c < keys; ++c) pointer[c] = k_data + head.seq.k_index(p.k, key0 + c, head.hk);
      pack_transposed(kt, ldk, pointer, keys, d);
      gemm(count, n, d_k, q + r0 * d_k, d_k, kt, ldk, s + r0 * lds, lds, false);

      for (i64 r = r0; r < r1; ++r) {
        float* row = s + r * lds;
        const i64 i = row0 + r;
        if (!head.plain) score_row(head, row, i, key0, n);
        if (partial || n != keys) {
          mask_row(head.mask, row, i, key0, n);
          for (i64 c = keys; c < n; ++c) row[c] = kNegInfinity;
        }
        const float factor = softmax_row(row, prob + r * lds, n, head.log2_scale, row_max[r], row_sum[r]);
        if (factor != 1.f)
          for (i64 c = 0; c < d_n; c += kLanes) store(o + r * d_n + c, load(o + r * d_n + c) * factor);
      }
      if (head.drops) drop_block(head, prob + r0 * lds, lds, row0 + r0, key0, count, keys);

      const T* v_data = static_cast<const T*>(p.v.data);
      for (i64 c = 0; c < keys; ++c) pointer[c] = v_data + head.seq.k_index(p.v, key0 + c, head.hv);
      pack_natural(v, ldv, pointer, keys, dv);
      gemm(count, d_n, round_up(keys, kPair<E>), prob + r0 * lds, lds, v, ldv, o + r0 * d_n, d_n, true);
    }
  }
}

template <class T>
void finish(const AttnParams& p, const Head& head, i64 row0, i64 rows, const Partial& part) {
  const i64 d_n = round_up(p.head_dim_v, kLanes);
  const float* sink = p.s_aux ? p.s_aux + head.h : nullptr;
  const float keep = head.drops ? 1.f / (1.f - p.dropout_p) : 1.f;
  for (i64 r = 0; r < rows; ++r) {
    RowResult result = finalize({part.max[r] * kLn2, part.sum[r]}, sink);
    result.scale *= keep;
    write_row<T>(p, head, row0 + r, part.o + r * d_n, result);
  }
}

// Few query rows and many keys: the keys are split so that every core has work. Results must not depend on the machine,
// so the number of splits follows from the problem alone.
constexpr i64 kSplitRows = 16, kSplitItems = 64, kSplitTiles = 8;

inline i64 splits_of(const AttnParams& p, i64 blocks) {
  if (p.seqlen_q > kSplitRows || p.batch * p.num_heads * blocks >= kSplitItems) return 1;
  return max<i64>(1, ceil_div(p.seqlen_k, kBlockN) / kSplitTiles);
}

template <class E, class T>
void forward_typed(const AttnParams& p, const strobe_executor& executor) {
  const i64 blocks = ceil_div(max<i64>(p.seqlen_q, 1), kBlockM), splits = splits_of(p, blocks);
  const i64 d_n = round_up(p.head_dim_v, kLanes), items = p.batch * p.num_heads * blocks;
  const double cost = double(p.num_heads) * double(p.total_q) * double(p.seqlen_k) * double(p.head_dim + p.head_dim_v);
  const auto clear_unused = [&](const Head& head, i64 begin, i64 end) {
    for (i64 i = begin; i < end; ++i) write_row<T>(p, head, i, nullptr, {0.f, kInfinity});
  };
  if (splits == 1) {
    return parallel_items(executor, items, cost, [&](i64 item) {
      // The last rows first: under a causal mask they see the most keys.
      const i64 row0 = (blocks - 1 - item % blocks) * kBlockM, h = item / blocks % p.num_heads;
      const SeqInfo seq = SeqInfo::of(p, item / blocks / p.num_heads);
      if (row0 >= seq.rows_q) return;
      const Head head = head_of(p, seq, h);
      const i64 end = min(row0 + kBlockM, seq.rows_q), used = min(end, max(row0, seq.seqlen_q));
      if (used > row0) {
        Scratch scratch;
        const Partial part = take_partial(scratch, used - row0, d_n);
        attend<E, T>(p, head, row0, used - row0, head.mask.visit(row0, used, kBlockN), part);
        finish<T>(p, head, row0, used - row0, part);
      }
      clear_unused(head, used, end);
    });
  }

  Scratch scratch;  // the calling thread's: outlives the workers
  Partial* parts = scratch.take<Partial>(items * splits);
  for (i64 n = 0; n < items * splits; ++n) parts[n] = take_partial(scratch, p.seqlen_q, d_n);
  parallel_items(executor, items * splits, cost, [&](i64 n) {
    const i64 item = n / splits, split_index = n % splits;
    const Head head = head_of(p, SeqInfo::of(p, item / p.num_heads), item % p.num_heads);
    const i64 rows = head.seq.seqlen_q;
    if (rows == 0) return;
    const Walk walk = head.mask.visit(0, rows, kBlockN);
    const i64 tiles = walk.tiles(), first = tiles * split_index / splits, last = tiles * (split_index + 1) / splits;
    if (first < last) attend<E, T>(p, head, 0, rows, split(walk, first, last), parts[n]);
  });
  for (i64 item = 0; item < items; ++item) {
    const Head head = head_of(p, SeqInfo::of(p, item / p.num_heads), item % p.num_heads);
    const i64 rows = head.seq.seqlen_q;
    const Partial& all = parts[item * splits];
    for (i64 s = 1; s < splits; ++s) {
      const Partial& part = parts[item * splits + s];
      for (i64 r = 0; r < rows; ++r) {
        RowState state = {all.max[r] * kLn2, all.sum[r]};
        const MergeFactors factors = merge(state, {part.max[r] * kLn2, part.sum[r]});
        all.max[r] = max(all.max[r], part.max[r]);
        all.sum[r] = state.sum;
        for (i64 c = 0; c < d_n; ++c)
          all.o[r * d_n + c] = all.o[r * d_n + c] * factors.a + part.o[r * d_n + c] * factors.b;
      }
    }
    finish<T>(p, head, 0, rows, all);
    clear_unused(head, rows, head.seq.rows_q);
  }
}

inline void forward(const AttnParams& p, const strobe_executor& executor) {
  switch (p.dtype) {
    case DType::f32:
      return forward_typed<float, float>(p, executor);
    case DType::f16:
      return forward_typed<float, f16>(p, executor);
#if defined(STROBE_HAS_BF16)
    case DType::bf16:
      return forward_typed<bf16, bf16>(p, executor);
#else
    case DType::bf16:
      return forward_typed<float, bf16>(p, executor);
#endif
  }
}

}  // namespace strobe::cpu::STROBE_ISA
