// Backward (Dao, arXiv 2307.08691, algorithm 2) in one pass of five products. With P the probabilities and
// delta = rowsum(dO * O) - dlse:
//   dV = P^T dO    dS = P * (dO V^T - delta)    dQ = dS K    dK = dS^T Q    dsink = -sum exp(sink - lse) * delta
//
// An item is a block of keys of the query heads that share key and value heads with no other query head; it owns its
// rows of dK and dV. A block of dQ takes the parts of several items, in the order of their keys (Turnstile), so that
// the result does not depend on the number of threads.
#pragma once

#include <cstdlib>
#include <new>
#include <numeric>
#include <thread>

#include "backward_tile.h"

namespace strobe::cpu::STROBE_ISA {

// Zeroed memory of one call; pages that are never touched cost nothing.
template <class T>
struct Buffer {
  explicit Buffer(i64 n) : data(static_cast<T*>(std::calloc(size_t(max<i64>(n, 1)), sizeof(T)))) {
    if (!data) throw std::bad_alloc();
  }
  ~Buffer() { std::free(data); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* const data;
};

// Lets the visitors of a block through one after another. Items are begun in increasing order of their keys, so those
// that a visitor waits for run already; this holds too when an executor runs its workers one by one.
struct Turnstile {
  u32* passed;  // per block
  bool* failed;

  void wait(i64 block, i64 turn) const {
    for (int spins = 0; i64(__atomic_load_n(passed + block, __ATOMIC_ACQUIRE)) != turn; ++spins) {
      if (__atomic_load_n(failed, __ATOMIC_RELAXED)) throw std::bad_alloc();  // no one will come: see fail()
      if (spins > 64) std::this_thread::yield();
    }
  }
  void pass(i64 block, i64 turn) const { __atomic_store_n(passed + block, u32(turn + 1), __ATOMIC_RELEASE); }
  void fail() const { __atomic_store_n(failed, true, __ATOMIC_RELAXED); }
};

// Keys per item: what it keeps for each (K, V, K^T, dK, dV) should fit the L2 cache with room for the query tile.
inline i64 keys_per_block(const AttnParams& p) {
  const i64 d = max(p.head_dim, p.head_dim_v);
  return d <= 128 ? 192 : d <= 256 ? 96 : 48;
}

template <class E, class T>
class Backward {
 public:
  Backward(const BackwardParams& params, const strobe_executor& executor)
      : b_(params),
        p_(params.fwd),
        executor_(executor),
        block_n_(keys_per_block(p_)),
        group_(std::lcm(p_.num_heads / p_.num_heads_k, p_.num_heads / p_.num_heads_v)),
        tiles_begin_(p_.batch + 1),
        delta_(p_.num_heads * p_.total_q),
        turns_(count_tiles()),
        dq_(p_.num_heads * tiles_begin_.data[p_.batch] * kQueryTile * p_.head_dim) {}

  void run() {
    make_delta();
    if (p_.page_size)
      run_paged();
    else
      run_blocks();
  }

 private:
  // One head's operands of a block of keys, and its gradients.
  struct KeyBlock {
    i64 key0, keys;
    E *k, *v;  // A operands of K Q^T and V dO^T
    E* k_t;    // A operand of dQ^T = K^T dS^T
    float *dk, *dv;
    i64 ld_k, ld_v, ld_kt, ld_dk, ld_dv;
  };

  double cost() const {
    return 5. * double(p_.num_heads) * double(p_.total_q) * double(max_keys_) * double(p_.head_dim + p_.head_dim_v) / 2;
  }

  // Tiles of query rows, per head, of the sequences before each; those of at most one block of keys need no sum.
  i64 count_tiles() {
    i64 tiles = 0;
    for (i64 b = 0; b < p_.batch; ++b) {
      const SeqInfo seq = SeqInfo::of(p_, b);
      tiles_begin_.data[b] = tiles;
      if (seq.seqlen_k > block_n_) tiles += ceil_div(seq.seqlen_q, kQueryTile);
      max_keys_ = max(max_keys_, seq.seqlen_k);
      max_rows_ = max(max_rows_, seq.rows_q);
    }
    tiles_begin_.data[p_.batch] = tiles;
    return tiles * p_.num_heads;
  }

  i64 tile_index(const Head& head, i64 m) const {
    const i64 begin = tiles_begin_.data[head.seq.batch], tiles = tiles_begin_.data[head.seq.batch + 1] - begin;
    return begin * p_.num_heads + head.h * tiles + m;
  }

  float* delta_of(const Head& head, i64 i) const {
    return delta_.data + head.h * p_.total_q + head.seq.q_batch * p_.seqlen_q + head.seq.q_begin + i;
  }

  T* dq_row(const Head& head, i64 i) const { return static_cast<T*>(b_.dq.data) + head.seq.q_index(b_.dq, i, head.h); }

  // delta, dsink, and the rows of dq that no key block reaches.
  void make_delta() {
    constexpr i64 kRows = 16 * kQueryTile;
    const i64 chunks = max<i64>(1, ceil_div(max_rows_, kRows)), per_head = p_.batch * chunks;
    const Buffer<double> sink(p_.num_heads * per_head);
    const double work = double(p_.num_heads) * double(p_.total_q) * double(p_.head_dim + p_.head_dim_v);
    parallel_items(executor_, p_.num_heads * per_head, work, [&](i64 item) {
      const SeqInfo seq = SeqInfo::of(p_, item % per_head / chunks);
      const i64 first = item % chunks * kRows, rows = min(first + kRows, seq.rows_q);
      if (first >= rows) return;
      const Head head = head_of(p_, seq, item / per_head);
      const i64 used = min(rows, seq.seqlen_q);
      double sum = 0.;
      for (i64 i = first; i < used; ++i) {
        const i64 at = seq.lse_index(p_, i, head.h);
        const float delta = p_.lse[at] == kInfinity ? 0.f : delta_row(head, i) - (b_.dlse ? b_.dlse[at] : 0.f);
        *delta_of(head, i) = delta;
        if (b_.ds_aux) sum -= double(probability(p_.s_aux[head.h], p_.lse[at])) * double(delta);
      }
      sink.data[item] = sum;
      for (i64 i = first; i < used; i += kQueryTile) {
        const i64 end = min(i + kQueryTile, used);
        if (head.mask.visit(i, end, block_n_).tiles() == 0) clear_dq(head, i, end);
      }
      clear_dq(head, max(first, used), rows);
    });
    for (i64 h = 0; b_.ds_aux && h < p_.num_heads; ++h) {
      double sum = 0.;
      for (i64 n = 0; n < per_head; ++n) sum += sink.data[h * per_head + n];
      b_.ds_aux[h] = float(sum);
    }
  }

  float delta_row(const Head& head, i64 i) const {
    const T* out = static_cast<const T*>(p_.out.data) + head.seq.q_index(p_.out, i, head.h);
    const T* dout = static_cast<const T*>(b_.dout.data) + head.seq.q_index(b_.dout, i, head.h);
    const i64 dv = p_.head_dim_v;
    vf sum = zero();
    i64 c = 0;
    for (; c + kLanes <= dv; c += kLanes) sum = fma(load(out + c), load(dout + c), sum);
    if (c < dv) sum = fma(load_first(out + c, dv - c), load_first(dout + c, dv - c), sum);
    return reduce_add(sum);
  }

  void clear_dq(const Head& head, i64 begin, i64 end) const {
    for (i64 i = begin; i < end; ++i) __builtin_memset(dq_row(head, i), 0, size_t(p_.head_dim) * sizeof(T));
  }

  void run_blocks() const {
    // All heads of the first keys, then all of the next: under a causal mask the first keys have the most work, and
    // items that run at once rarely meet at a turnstile.
    const i64 blocks = max<i64>(1, ceil_div(max_keys_, block_n_)), groups = p_.num_heads / group_;
    parallel_items(executor_, blocks * p_.batch * groups, cost(), [&](i64 item) {
      const i64 n = item / groups / p_.batch;
      const SeqInfo seq = SeqInfo::of(p_, item / groups % p_.batch);
      if (n == 0) clear_unused_keys(seq, item % groups * group_);
      if (n * block_n_ >= seq.seqlen_k) return;
      const auto write = [&](const KeyBlock& keys, i64 h, const Rows& to, const float* from, i64 ld, i64 d,
                             float scale) {
        for (i64 c = 0; c < keys.keys; ++c)
          write_scaled(static_cast<T*>(to.data) + seq.k_index(to, keys.key0 + c, h), from + c * ld, d, scale);
      };
      const auto write_k = [&](const KeyBlock& keys, i64 h) {
        write(keys, h, b_.dk, keys.dk, keys.ld_dk, p_.head_dim, p_.scale);
      };
      const auto write_v = [&](const KeyBlock& keys, i64 h) {
        write(keys, h, b_.dv, keys.dv, keys.ld_dv, p_.head_dim_v, 1.f);
      };
      guarded([&] { key_block(seq, item % groups * group_, n, write_k, write_v); });
    });
  }

  template <class F>
  void guarded(F f) const {
    try {
      f();
    } catch (...) {
      turnstile_.fail();
      throw;
    }
  }

  // A page may belong to several sequences. The pages in use have fp32 sums, which the items of a group of heads add to
  // in their order.
  void run_paged() const {
    const Buffer<i32> slots(p_.num_pages), table(p_.batch * p_.max_pages);  // 1 + index among the pages in use; index
    const i64 used = list_pages(slots.data, table.data);
    const i64 dk_row = p_.num_heads_k * p_.head_dim, dv_row = p_.num_heads_v * p_.head_dim_v, size = p_.page_size;
    const Buffer<float> dk(used * size * dk_row), dv(used * size * dv_row);
    const Rows dk_sum = {dk.data, size * dk_row, dk_row, p_.head_dim};
    const Rows dv_sum = {dv.data, size * dv_row, dv_row, p_.head_dim_v};
    const Buffer<u32> turns(p_.num_heads_k + p_.num_heads_v);

    struct Block {
      i64 batch, n;
    };
    const i64 blocks = max<i64>(1, ceil_div(max_keys_, block_n_)), groups = p_.num_heads / group_;
    const Buffer<Block> list(blocks * p_.batch);
    i64 count = 0;
    for (i64 n = 0; n < blocks; ++n)
      for (i64 b = 0; b < p_.batch; ++b)
        if (n * block_n_ < SeqInfo::of(p_, b).seqlen_k) list.data[count++] = {b, n};

    parallel_items(executor_, count * groups, cost(), [&](i64 item) {
      const Block& block = list.data[item / groups];
      SeqInfo sums = SeqInfo::of(p_, block.batch);
      sums.pages = table.data + block.batch * p_.max_pages;
      sums.num_pages = used;
      const Turnstile turnstile = {turns.data, turnstile_.failed};
      const auto add = [&](i64 at, const KeyBlock& keys, i64 h, const Rows& to, const float* from, i64 ld, i64 d,
                           float scale) {
        turnstile.wait(at, item / groups);
        for (i64 c = 0; c < keys.keys; ++c)
          write_scaled<true>(static_cast<float*>(to.data) + sums.k_index(to, keys.key0 + c, h), from + c * ld, d,
                             scale);
        turnstile.pass(at, item / groups);
      };
      const auto add_k = [&](const KeyBlock& keys, i64 h) {
        add(h, keys, h, dk_sum, keys.dk, keys.ld_dk, p_.head_dim, p_.scale);
      };
      const auto add_v = [&](const KeyBlock& keys, i64 h) {
        add(p_.num_heads_k + h, keys, h, dv_sum, keys.dv, keys.ld_dv, p_.head_dim_v, 1.f);
      };
      guarded([&] { key_block(SeqInfo::of(p_, block.batch), item % groups * group_, block.n, add_k, add_v); });
    });
    parallel_items(executor_, p_.num_pages, double(p_.num_pages * size) * double(dk_row + dv_row), [&](i64 page) {
      const i64 slot = slots.data[page] - 1;
      for (i64 r = 0; r < size; ++r) {
        for (i64 h = 0; h < p_.num_heads_k; ++h) write_page_row(b_.dk, page, dk_sum, slot, r, h, p_.head_dim);
        for (i64 h = 0; h < p_.num_heads_v; ++h) write_page_row(b_.dv, page, dv_sum, slot, r, h, p_.head_dim_v);
      }
    });
  }

  // Numbers the pages that hold keys of some sequence, and rewrites the page table in these numbers.
  i64 list_pages(i32* slots, i32* table) const {
    i32 used = 0;
    for (i64 b = 0; b < p_.batch; ++b) {
      const SeqInfo seq = SeqInfo::of(p_, b);
      for (i64 c = seq.leftpad / p_.page_size; c * p_.page_size < seq.leftpad + seq.seqlen_k; ++c) {
        i32& slot = slots[max<i64>(0, min<i64>(seq.pages[c], p_.num_pages - 1))];
        if (slot == 0) slot = ++used;
        table[b * p_.max_pages + c] = slot - 1;
      }
    }
    return used;
  }

  static void write_page_row(const Rows& to, i64 page, const Rows& sum, i64 slot, i64 r, i64 h, i64 d) {
    const auto at = [&](const Rows& x, i64 p) { return p * x.batch_stride + r * x.row_stride + h * x.head_stride; };
    T* row = static_cast<T*>(to.data) + at(to, page);
    if (slot < 0)
      __builtin_memset(row, 0, size_t(d) * sizeof(T));
    else
      write_scaled(row, static_cast<const float*>(sum.data) + at(sum, slot), d, 1.f);
  }

  // Padding on the left, and keys beyond those used, of the heads that belong to query heads h0 .. h0 + group_ - 1.
  void clear_unused_keys(const SeqInfo& seq, i64 h0) const {
    const i64 per_k = p_.num_heads / p_.num_heads_k, per_v = p_.num_heads / p_.num_heads_v;
    const auto clear = [&](i64 begin, i64 end) {
      for (i64 j = begin; j < end; ++j) {
        for (i64 h = h0 / per_k; h < (h0 + group_) / per_k; ++h)
          __builtin_memset(static_cast<T*>(b_.dk.data) + seq.k_index(b_.dk, j, h), 0, size_t(p_.head_dim) * sizeof(T));
        for (i64 h = h0 / per_v; h < (h0 + group_) / per_v; ++h)
          __builtin_memset(static_cast<T*>(b_.dv.data) + seq.k_index(b_.dv, j, h), 0,
                           size_t(p_.head_dim_v) * sizeof(T));
      }
    };
    const i64 end = seq.rows_k - seq.leftpad;
    clear(-seq.leftpad, min<i64>(0, end));
    clear(seq.seqlen_k, end);
  }

  // Keys n * block_n_ and following for query heads h0 .. h0 + group_ - 1. flush_k(block, h) takes what the block has
  // of dk of key head h, flush_v that of dv.
  template <class K, class V>
  void key_block(const SeqInfo& seq, i64 h0, i64 n, const K& flush_k, const V& flush_v) const {
    const i64 per_k = p_.num_heads / p_.num_heads_k, per_v = p_.num_heads / p_.num_heads_v;
    Scratch scratch;
    KeyBlock block = take_block(scratch, n * block_n_, min(block_n_, seq.seqlen_k - n * block_n_));
    QueryTile<E> queries = take_query_tile<E>(scratch, p_.head_dim, p_.head_dim_v);
    const TileScores<E> scores = take_scores<E>(scratch, block.keys, p_.dropout_p > 0.f);
    float* dq = scratch.take<float>(p_.head_dim * kQueryTile);
    for (i64 h = h0; h < h0 + group_; ++h) {
      const Head head = head_of(p_, seq, h);
      if (h % per_k == 0) load_k(head, block);
      if (h % per_v == 0) load_v(head, block);
      const Walk walk = head.mask.visit_queries(block.key0, block.key0 + block_n_, kQueryTile);
      // Backwards: the item of the next keys then follows this one instead of waiting for it at the diagonal.
      for (int r = 1; r >= 0; --r) {
        const Run& run = walk.run[r];
        for (i64 m = run.end - 1; m >= run.begin; --m)
          tile(head, block, n, m, m < run.full_begin || m >= run.full_end, queries, scores, dq);
      }
      if (h % per_k == per_k - 1) flush_k(block, head.hk);
      if (h % per_v == per_v - 1) flush_v(block, head.hv);
    }
  }

  KeyBlock take_block(Scratch& scratch, i64 key0, i64 keys) const {
    KeyBlock block;
    block.key0 = key0;
    block.keys = keys;
    block.ld_k = round_up(p_.head_dim, kPair<E>);
    block.ld_v = round_up(p_.head_dim_v, kPair<E>);
    block.ld_kt = round_up(keys, kLanes);
    block.ld_dk = round_up(p_.head_dim, kLanes);
    block.ld_dv = round_up(p_.head_dim_v, kLanes);
    block.k = scratch.take<E>(keys * block.ld_k);
    block.v = scratch.take<E>(keys * block.ld_v);
    block.k_t = scratch.take<E>(p_.head_dim * block.ld_kt);
    block.dk = scratch.take<float>(keys * block.ld_dk);
    block.dv = scratch.take<float>(keys * block.ld_dv);
    return block;
  }

  void load_k(const Head& head, KeyBlock& block) const {
    Scratch scratch;
    const T** pointer = scratch.take<const T*>(block.keys);
    const T* data = static_cast<const T*>(p_.k.data);
    for (i64 c = 0; c < block.keys; ++c) pointer[c] = data + head.seq.k_index(p_.k, block.key0 + c, head.hk);
    pack_rows(block.k, block.ld_k, pointer, block.keys, p_.head_dim, block.ld_k);
    const i64 d = p_.head_dim, n = block.ld_kt;
    if constexpr (kPair<E> == 1) {
      pack_transposed(block.k_t, n, pointer, block.keys, d);
    } else {  // an A operand, so not in pairs of rows
      float* wide = scratch.take<float>(d * n);
      pack_transposed(wide, n, pointer, block.keys, d);
      for (i64 at = 0; at < d * n; at += kLanes) store(block.k_t + at, load(wide + at));
    }
    __builtin_memset(block.dk, 0, size_t(block.keys * block.ld_dk) * sizeof(float));
  }

  void load_v(const Head& head, KeyBlock& block) const {
    Scratch scratch;
    const T** pointer = scratch.take<const T*>(block.keys);
    const T* data = static_cast<const T*>(p_.v.data);
    for (i64 c = 0; c < block.keys; ++c) pointer[c] = data + head.seq.k_index(p_.v, block.key0 + c, head.hv);
    pack_rows(block.v, block.ld_v, pointer, block.keys, p_.head_dim_v, block.ld_v);
    __builtin_memset(block.dv, 0, size_t(block.keys * block.ld_dv) * sizeof(float));
  }

  void tile(const Head& head, const KeyBlock& block, i64 n, i64 m, bool masked, QueryTile<E>& q, const TileScores<E>& t,
            float* own_dq) const {
    const i64 row0 = m * kQueryTile, rows = min(kQueryTile, head.seq.seqlen_q - row0), d = p_.head_dim;
    const KeySpan span = masked ? seen_keys(head.mask, row0, rows, block.key0, block.keys) : KeySpan{0, block.keys};
    const i64 first = span.first, keys = span.last - first, at = first * kQueryTile;
    if (keys > 0) {
      pack_queries<E, T>(b_, head, row0, rows, delta_of(head, row0), q);
      gemm(keys, q.cols, block.ld_k, block.k + first * block.ld_k, block.ld_k, q.q_t, kQueryTile, t.s + at, kQueryTile,
           false);
      gemm(keys, q.cols, block.ld_v, block.v + first * block.ld_v, block.ld_v, q.dout_t, kQueryTile, t.dp + at,
           kQueryTile, false);
      if (head.drops) draw_tile(head, 1.f / (1.f - p_.dropout_p), row0, q.cols, block.key0 + first, keys, t.kept + at);
      if (head.plain && !masked && !head.drops)
        gradient_tile<true>(head, q, block.key0, first, span.last, masked, t);
      else
        gradient_tile<false>(head, q, block.key0, first, span.last, masked, t);
      const i64 k = round_up(rows, kPair<E>);
      gemm(keys, block.ld_dv, k, t.p + at, kQueryTile, q.dout, q.ld_dout, block.dv + first * block.ld_dv, block.ld_dv,
           true);
      gemm(keys, block.ld_dk, k, t.ds + at, kQueryTile, q.q, q.ld_q, block.dk + first * block.ld_dk, block.ld_dk, true);
    }

    const auto add_dq = [&](float* dq, bool accumulate) {
      gemm(d, keys > 0 ? q.cols : kQueryTile, round_up(keys, kPair<E>), block.k_t + first, block.ld_kt, t.ds_b + at,
           kQueryTile, dq, kQueryTile, accumulate);
    };
    const auto write_dq = [&](const float* dq) {
      T* pointer[kQueryTile];
      for (i64 r = 0; r < rows; ++r) pointer[r] = dq_row(head, row0 + r);
      write_transposed(pointer, rows, dq, d, p_.scale);
    };
    const Walk visitors = head.mask.visit(row0, row0 + rows, block_n_);
    const i64 turn = rank(visitors, n), turns = visitors.tiles();
    if (turns == 1) {
      add_dq(own_dq, false);
      return write_dq(own_dq);
    }
    const i64 index = tile_index(head, m);
    float* dq = dq_.data + index * kQueryTile * d;
    turnstile_.wait(index, turn);
    if (keys > 0 || turn == 0) add_dq(dq, turn > 0);
    if (turn == turns - 1) write_dq(dq);
    turnstile_.pass(index, turn);
  }

  const BackwardParams& b_;
  const AttnParams& p_;
  const strobe_executor& executor_;
  i64 block_n_, group_;
  i64 max_keys_ = 0, max_rows_ = 0;
  Buffer<i64> tiles_begin_;
  Buffer<float> delta_;  // [num_heads, total_q]
  Buffer<u32> turns_;
  Buffer<float> dq_;  // dQ^T / scale of the tiles, [head_dim, kQueryTile] each
  bool failed_ = false;
  const Turnstile turnstile_ = {turns_.data, &failed_};
};

template <class E, class T>
void backward_typed(const BackwardParams& params, const strobe_executor& executor) {
  Backward<E, T>(params, executor).run();
}

inline void backward(const BackwardParams& params, const strobe_executor& executor) {
  switch (params.fwd.dtype) {
    case DType::f32:
      return backward_typed<float, float>(params, executor);
    case DType::f16:
      return backward_typed<float, f16>(params, executor);
#if defined(STROBE_HAS_BF16)
    case DType::bf16:
      return backward_typed<bf16, bf16>(params, executor);
#else
    case DType::bf16:
      return backward_typed<float, bf16>(params, executor);
#endif
  }
}

}  // namespace strobe::cpu::STROBE_ISA
