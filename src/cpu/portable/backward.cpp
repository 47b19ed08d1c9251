// Backward: probabilities are recomputed from the LSE tile by tile, and each pair of tiles gives its part of dq, dk and
// dv (Dao, arXiv 2307.08691, algorithm 2). With P the probabilities and delta = rowsum(dO * O) - dlse:
//   dV = P^T dO    dS = P * (dO V^T - delta)    dQ = dS K    dK = dS^T Q    dsink = -sum exp(sink - lse) * delta
#include <cstring>
#include <numeric>

#include "cpu/cpu.h"
#include "cpu/portable/head.h"
#include "cpu/portable/parallel.h"

namespace strobe::cpu {
namespace {

// dk and dv in fp32, laid out [entries, rows, heads, dim], where sequences may share keys (pages, cache_batch_idx).
struct SharedGradient {
  std::vector<float> sum;
  Rows rows;
};

struct Gradients {
  const BackwardParams& b;
  SharedGradient dk, dv;
  bool shared;
  std::vector<double> ds_aux;  // [batch, num_heads]
};

i64 key_entries(const AttnParams& p) { return p.page_size ? p.num_pages : p.cu_seqlens_k ? 1 : p.batch; }

void make_shared(const AttnParams& p, i64 heads, i64 dim, SharedGradient& gradient) {
  const i64 rows = p.page_size ? p.page_size : p.seqlen_k;
  gradient.sum.assign(key_entries(p) * rows * heads * dim, 0.f);
  gradient.rows = {gradient.sum.data(), rows * heads * dim, heads * dim, dim};
}

void store_shared(const AttnParams& p, i64 heads, i64 dim, const SharedGradient& from, const Rows& to) {
  const i64 rows = p.page_size ? p.page_size : p.seqlen_k;
  for (i64 e = 0; e < key_entries(p); ++e)
    for (i64 r = 0; r < rows; ++r)
      for (i64 h = 0; h < heads; ++h) {
        const i64 at = e * to.batch_stride + r * to.row_stride + h * to.head_stride;
        store_row(p.dtype, &from.sum[((e * rows + r) * heads + h) * dim], 1.f, dim,
                  static_cast<char*>(to.data) + at * element_size(p.dtype));
      }
}

// Query heads [h0, h1) of one sequence: those that share their key and value heads with no other query head.
class Group {
 public:
  Group(Gradients& gradients, const SeqInfo& seq, i64 h0, i64 h1)
      : g_(gradients),
        p_(gradients.b.fwd),
        seq_(seq),
        h0_(h0),
        h1_(h1),
        d_(padded(p_.head_dim)),
        dv_(padded(p_.head_dim_v)) {}

  void run() {
    dq_.assign((h1_ - h0_) * seq_.seqlen_q * d_, 0.f);
    delta_.resize((h1_ - h0_) * seq_.seqlen_q);
    q_.resize(kBlockM * d_), k_transposed_.resize(d_ * kBlockN), dout_.resize(kBlockM * dv_);
    v_transposed_.resize(dv_ * kBlockN), k_.resize(kBlockN * d_), v_.resize(kBlockN * dv_);
    scores_.resize(kBlockN * kBlockM), dp_.resize(kBlockN * kBlockM), dk_.resize(kBlockN * d_),
        dvalue_.resize(kBlockN * dv_);
    row_.resize(2 * kBlockN);
    for (i64 h = h0_; h < h1_; ++h) make_delta(h);
    for (i64 first = 0; first < seq_.seqlen_k; first += kBlockN) key_block(first);
    store_dq();
    if (!g_.shared) clear_unused_keys();
  }

 private:
  char* at(const Rows& rows, i64 index) const { return static_cast<char*>(rows.data) + index * element_size(p_.dtype); }

  void make_delta(i64 h) {
    const BackwardParams& b = g_.b;
    std::vector<float> out(p_.head_dim_v), dout(p_.head_dim_v);
    double sink_sum = 0.;
    for (i64 i = 0; i < seq_.seqlen_q; ++i) {
      const void* out_row = at(p_.out, seq_.q_index(p_.out, i, h));
      const void* dout_row = at(b.dout, seq_.q_index(b.dout, i, h));
      load_rows(p_.dtype, &out_row, 1, p_.head_dim_v, out.data(), p_.head_dim_v);
      load_rows(p_.dtype, &dout_row, 1, p_.head_dim_v, dout.data(), p_.head_dim_v);
      const i64 lse_at = seq_.lse_index(p_, i, h);
      float sum = b.dlse ? -b.dlse[lse_at] : 0.f;
      for (i64 c = 0; c < p_.head_dim_v; ++c) sum += out[c] * dout[c];
      delta_[(h - h0_) * seq_.seqlen_q + i] = sum;
      if (p_.s_aux) sink_sum -= double(probability(p_.s_aux[h], p_.lse[lse_at])) * sum;
    }
    g_.ds_aux[seq_.batch * p_.num_heads + h] = sink_sum;
  }

  void key_block(i64 first) {
    const i64 group_k = p_.num_heads / p_.num_heads_k, group_v = p_.num_heads / p_.num_heads_v;
    const i64 cols = min(kBlockN, seq_.seqlen_k - first);
    for (i64 h = h0_; h < h1_; ++h) {
      Head head(p_, seq_, h);
      if (h % group_k == 0) {
        std::fill(dk_.begin(), dk_.end(), 0.f);
        head.load_k(p_.k, first, cols, head.hk, p_.head_dim, k_.data(), d_);
        transpose(k_.data(), d_, cols, d_, k_transposed_.data(), kBlockN);
      }
      if (h % group_v == 0) {
        std::fill(dvalue_.begin(), dvalue_.end(), 0.f);
        head.load_k(p_.v, first, cols, head.hv, p_.head_dim_v, v_.data(), dv_);
        transpose(v_.data(), dv_, cols, dv_, v_transposed_.data(), kBlockN);
      }
      const Walk walk = head.mask.visit_queries(first, first + kBlockN, kBlockM);
      for (const Run& run : walk.run)
        for (i64 m = run.begin; m < run.end; ++m)
          tile(head, first, cols, m * kBlockM, m < run.full_begin || m >= run.full_end);
      if (h % group_k == group_k - 1) flush(first, cols, head.hk, p_.head_dim, dk_, d_, g_.b.dk, g_.dk);
      if (h % group_v == group_v - 1) flush(first, cols, head.hv, p_.head_dim_v, dvalue_, dv_, g_.b.dv, g_.dv);
    }
  }

  void tile(Head& head, i64 first, i64 cols, i64 first_row, bool masked) {
    const i64 rows = min(kBlockM, seq_.seqlen_q - first_row), at_row = (head.h - h0_) * seq_.seqlen_q + first_row;
    head.load_q(p_.q, first_row, rows, p_.head_dim, q_.data(), d_);
    head.load_q(g_.b.dout, first_row, rows, p_.head_dim_v, dout_.data(), dv_);
    gemm(rows, kBlockN, d_, q_.data(), d_, 1, k_transposed_.data(), kBlockN, scores_.data(), kBlockN, false);
    gemm(rows, kBlockN, dv_, dout_.data(), dv_, 1, v_transposed_.data(), kBlockN, dp_.data(), kBlockN, false);
    for (i64 r = 0; r < rows; ++r) {
      const i64 i = first_row + r;
      float *s = &scores_[r * kBlockN], *dp = &dp_[r * kBlockN];
      row_gradient(head, i, first, cols, masked, delta_[at_row + r], s, dp);
    }
    gemm(cols, dv_, rows, scores_.data(), 1, kBlockN, dout_.data(), dv_, dvalue_.data(), dv_, true);
    gemm(cols, d_, rows, dp_.data(), 1, kBlockN, q_.data(), d_, dk_.data(), d_, true);
    gemm(rows, d_, cols, dp_.data(), kBlockN, 1, k_.data(), d_, &dq_[at_row * d_], d_, true);
  }

  // s: q.k on entry, the (dropped) probability on return. dp: dO.v on entry, d q.k on return.
  void row_gradient(const Head& head, i64 i, i64 first, i64 cols, bool masked, float delta, float* s, float* dp) {
    const float lse = p_.lse[seq_.lse_index(p_, i, head.h)];
    float* slope = row_.data();  // d score / d q.k
    if (p_.softcap != 0.f)
      for (i64 c = 0; c < cols; ++c) slope[c] = head.score.derivative(head.score.capped(s[c]));
    head.score_row(s, i, first, cols);
    if (masked) head.mask_row(s, i, first, cols, kNegInfinity);
    if (lse == kInfinity) {  // an empty row
      std::fill(s, s + cols, 0.f);
    } else {
      exp_row(s, cols, lse);
    }
    if (p_.dropout_p > 0.f) {
      float* kept = row_.data() + kBlockN;
      std::fill(kept, kept + cols, 1.f);
      head.drop_row(kept, i, first, cols);
      for (i64 c = 0; c < cols; ++c) {
        dp[c] = s[c] * (dp[c] * kept[c] - delta);
        s[c] *= kept[c];
      }
    } else {
      for (i64 c = 0; c < cols; ++c) dp[c] = s[c] * (dp[c] - delta);
    }
    if (p_.softcap != 0.f) {
      for (i64 c = 0; c < cols; ++c) dp[c] *= slope[c];
    } else {
      scale_row(dp, cols, p_.scale);
    }
  }

  void flush(i64 first, i64 cols, i64 kv_head, i64 dim, const std::vector<float>& acc, i64 ld, const Rows& to,
             SharedGradient& shared) {
    for (i64 c = 0; c < cols; ++c) {
      if (!g_.shared) {
        store_row(p_.dtype, &acc[c * ld], 1.f, dim, at(to, seq_.k_index(to, first + c, kv_head)));
        continue;
      }
      float* sum = &shared.sum[seq_.k_index(shared.rows, first + c, kv_head)];
      for (i64 x = 0; x < dim; ++x) sum[x] += acc[c * ld + x];
    }
  }

  void store_dq() {
    const std::vector<float> zeros(d_, 0.f);
    for (i64 h = h0_; h < h1_; ++h)
      for (i64 i = 0; i < seq_.rows_q; ++i) {
        const float* row = i < seq_.seqlen_q ? &dq_[((h - h0_) * seq_.seqlen_q + i) * d_] : zeros.data();
        store_row(p_.dtype, row, 1.f, p_.head_dim, at(g_.b.dq, seq_.q_index(g_.b.dq, i, h)));
      }
  }

  // Left padding and keys behind the used ones.
  void clear_unused_keys() {
    const std::vector<float> zeros(max(d_, dv_), 0.f);
    const i64 group_k = p_.num_heads / p_.num_heads_k, group_v = p_.num_heads / p_.num_heads_v;
    for (i64 row = 0; row < seq_.rows_k; ++row) {
      const i64 j = row - seq_.leftpad;
      if (j >= 0 && j < seq_.seqlen_k) continue;
      for (i64 h = h0_ / group_k; h < h1_ / group_k; ++h)
        store_row(p_.dtype, zeros.data(), 1.f, p_.head_dim, at(g_.b.dk, seq_.k_index(g_.b.dk, j, h)));
      for (i64 h = h0_ / group_v; h < h1_ / group_v; ++h)
        store_row(p_.dtype, zeros.data(), 1.f, p_.head_dim_v, at(g_.b.dv, seq_.k_index(g_.b.dv, j, h)));
    }
  }

  Gradients& g_;
  const AttnParams& p_;
  const SeqInfo& seq_;
  i64 h0_, h1_, d_, dv_;
  std::vector<float> dq_, delta_, q_, k_transposed_, dout_, v_transposed_, k_, v_, scores_, dp_, dk_, dvalue_, row_;
};

}  // namespace

void backward(const BackwardParams& b, const strobe_executor& executor) {
  const AttnParams& p = b.fwd;
  const i64 heads = std::lcm(p.num_heads / p.num_heads_k, p.num_heads / p.num_heads_v), groups = p.num_heads / heads;
  Gradients gradients{b, {}, {}, p.page_size > 0 || p.cache_batch_idx, std::vector<double>(p.batch * p.num_heads, 0.)};
  if (gradients.shared) {
    make_shared(p, p.num_heads_k, p.head_dim, gradients.dk);
    make_shared(p, p.num_heads_v, p.head_dim_v, gradients.dv);
    // Sequences may add to the same keys, so a group takes them one after another.
    parallel_items(executor, groups, 2.5 * flops_of(p), [&](i64 group) {
      for (i64 batch = 0; batch < p.batch; ++batch) {
        const SeqInfo seq = SeqInfo::of(p, batch);
        Group(gradients, seq, group * heads, (group + 1) * heads).run();
      }
    });
    store_shared(p, p.num_heads_k, p.head_dim, gradients.dk, b.dk);
    store_shared(p, p.num_heads_v, p.head_dim_v, gradients.dv, b.dv);
  } else {
    parallel_items(executor, p.batch * groups, 2.5 * flops_of(p), [&](i64 item) {
      const SeqInfo seq = SeqInfo::of(p, item / groups);
      Group(gradients, seq, item % groups * heads, (item % groups + 1) * heads).run();
    });
  }
  if (b.ds_aux)
    for (i64 h = 0; h < p.num_heads; ++h) {
      double sum = 0.;
      for (i64 batch = 0; batch < p.batch; ++batch) sum += gradients.ds_aux[batch * p.num_heads + h];
      b.ds_aux[h] = float(sum);
    }
}

}  // namespace strobe::cpu
