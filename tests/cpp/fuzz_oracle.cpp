#include "fuzz_oracle.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/philox.h"

namespace fuzz {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kRound32 = 0x1p-24;  // half an ulp, relative
constexpr double kTiny = 1e-35;       // what exp() and subnormals may flush
constexpr i64 kFar = i64(1) << 40;    // farther than any length

double rounding(int32_t dtype) {
  return dtype == STROBE_FLOAT32 ? kRound32 : dtype == STROBE_FLOAT16 ? 0x1p-11 : 0x1p-8;
}
// The engine may multiply bf16 probabilities where the tensors are bf16; f16 and f32 go through f32.
double rounding_inside(int32_t dtype) { return dtype == STROBE_BFLOAT16 ? 0x1p-8 : kRound32; }
double smallest(int32_t dtype) { return dtype == STROBE_FLOAT16 ? 0x1p-24 : kTiny; }

i64 index_at(const strobe_tensor& t, i64 at) {
  if (at < 0 || at >= t.shape[t.ndim - 1]) throw Outside("an index beyond an index tensor");
  int32_t value;
  std::memcpy(&value, static_cast<const char*>(t.data) + at * 4, 4);
  return value;
}

i64 checked(i64 row, i64 rows, const char* what) {
  if (row < 0 || row >= rows) throw Outside(what);
  return row;
}

// Row-major, [rows, heads, dim].
struct Matrix {
  std::vector<double> values;
  i64 rows = 0, heads = 0, dim = 0;
  explicit Matrix(const strobe_tensor& t) : values(read(t)), heads(t.shape[t.ndim - 2]), dim(t.shape[t.ndim - 1]) {
    rows = t.ndim == 3 ? t.shape[0] : t.shape[0] * t.shape[1];
  }
  i64 index(i64 row, i64 head) const { return (row * heads + head) * dim; }
  const double* row(i64 row, i64 head) const { return values.data() + index(row, head); }
};

// Everything about a call that its pairs need.
struct Call {
  const strobe_args& args;
  Matrix q, k, v;
  std::vector<Sequence> sequences;
  double scale, softcap, gain = 1;
  double q_error = 0;  // relative, of q's elements
  std::vector<double> slopes, sinks;
  strobe::Dropout dropout{};

  Call(const strobe_args& args, i64 seqlen_new)
      : args(args), q(*args.q), k(*args.k), v(*args.v), sequences(sequences_of(args, seqlen_new)) {
    scale = static_cast<float>(args.has_softmax_scale ? args.softmax_scale : 1 / std::sqrt(double(q.dim)));
    softcap = static_cast<float>(args.softcap);
    const float p = static_cast<float>(args.dropout_p);
    if (p > 0) gain = 1 / (1 - double(p));
    dropout = {args.seed, args.offset, strobe::keep_threshold(p)};
    if (args.alibi_slopes) slopes = read(*args.alibi_slopes);
    if (args.s_aux) sinks = read(*args.s_aux);
  }
  bool drops() const { return args.dropout_p > 0; }
  double slope(i64 b, i64 h) const {
    if (slopes.empty()) return 0;
    return slopes[static_cast<size_t>(args.alibi_slopes->ndim == 2 ? b * q.heads + h : h)];
  }
  size_t lse_index(i64 q_row, i64 h) const {
    if (args.q->ndim == 3) return static_cast<size_t>(h * q.rows + q_row);
    const i64 sq = args.q->shape[1];
    return static_cast<size_t>((q_row / sq * q.heads + h) * sq + q_row % sq);
  }
};

bool visible(const strobe_args& args, i64 b, i64 i, i64 j, i64 seqlen_q, i64 seqlen_k) {
  const i64 off = seqlen_k - seqlen_q;
  i64 left = args.window_left < 0 ? kFar : std::min(args.window_left, kFar);
  i64 right = args.window_right < 0 ? kFar : std::min(args.window_right, kFar);
  if (args.causal) right = 0;
  if (args.force_fa_decode && seqlen_q == 1) left = kFar;
  if (args.full_from && i >= index_at(*args.full_from, b)) left = kFar;
  return j < std::min(seqlen_k, i + off + right + 1) && (j >= std::max<i64>(0, i + off - left) || j < args.keep_first);
}

double dot(const double* a, const double* b, i64 n) {
  double sum = 0;
  for (i64 c = 0; c < n; ++c) sum += a[c] * b[c];
  return sum;
}
double dot_sizes(const double* a, const double* b, i64 n) {
  double sum = 0;
  for (i64 c = 0; c < n; ++c) sum += std::fabs(a[c] * b[c]);
  return sum;
}

// One visible pair.
struct Pair {
  i64 j, k_row;
  double score, error;  // absolute error of the score
  double slope;         // d score / d (q.k)
  double slope_error;
  double kept;  // 1 / (1 - p), 0 if dropped
  double p = 0;
};

// A row of scores and its softmax; `seen` are its visible keys.
struct Row {
  std::vector<Pair> seen;
  double lse = kInf, lse_error = 0;
  double score_error = 0;  // the largest
};

Row row_of(const Call& call, i64 b, i64 h, i64 i) {
  const Sequence& s = call.sequences[static_cast<size_t>(b)];
  const i64 seqlen_q = static_cast<i64>(s.q_rows.size()), seqlen_k = static_cast<i64>(s.k_rows.size());
  const i64 hk = h / (call.q.heads / call.k.heads), d = call.q.dim;
  const double* q = call.q.row(s.q_rows[static_cast<size_t>(i)], h);
  Row row;
  double top = -kInf;
  for (i64 j = 0; j < seqlen_k; ++j) {
    if (!visible(call.args, b, i, j, seqlen_q, seqlen_k)) continue;
    Pair pair;
    pair.j = j;
    pair.k_row = s.k_rows[static_cast<size_t>(j)];
    const double* k = call.k.row(pair.k_row, hk);
    const double size = std::fabs(call.scale) * dot_sizes(q, k, d);
    double x = call.scale * dot(q, k, d);
    pair.error = size * (double(d + 16) * kRound32 + call.q_error);
    pair.slope = call.scale;
    pair.slope_error = 0;
    if (call.softcap > 0) {
      const double t = std::tanh(x / call.softcap);
      x = call.softcap * t;
      pair.slope = call.scale * (1 - t * t);
      pair.slope_error = std::fabs(call.scale) * (32 * kRound32 + 2 * pair.error / call.softcap);
      pair.error += 8 * kRound32 * call.softcap;
    }
    const double bias = call.slope(b, h) * std::fabs(double(i + seqlen_k - seqlen_q - j));
    pair.score = x - bias;
    pair.error += 8 * kRound32 * (std::fabs(x) + std::fabs(bias));
    pair.kept = call.drops() ? call.dropout.keep(i, j, b * call.q.heads + h) ? call.gain : 0 : 1;
    top = std::max(top, pair.score);
    row.score_error = std::max(row.score_error, pair.error);
    row.seen.push_back(pair);
  }
  const bool has_sink = !call.sinks.empty();
  const double sink = has_sink ? call.sinks[static_cast<size_t>(h)] : -kInf;
  top = std::max(top, sink);
  if (row.seen.empty() && !has_sink) return row;
  double sum = std::exp(sink - top);
  for (const Pair& pair : row.seen) sum += std::exp(pair.score - top);
  row.lse = top + std::log(sum);
  for (Pair& pair : row.seen) pair.p = std::exp(pair.score - row.lse);
  row.lse_error = row.score_error + double(row.seen.size() + 16) * kRound32 + 8 * kRound32 * std::fabs(row.lse);
  return row;
}

// What is written is rounded once more.
double written(int32_t dtype, double value, double error) {
  return error + 1.01 * rounding(dtype) * (std::fabs(value) + error) + smallest(dtype);
}

// out of one row, into out[0 .. dv).
void output_row(const Call& call, const Row& row, i64 h, double* out, double* error) {
  const i64 hv = h / (call.q.heads / call.v.heads), dv = call.v.dim;
  const double relative =
      2 * row.score_error + double(row.seen.size() + 32) * kRound32 + 1.01 * rounding_inside(call.args.q->dtype);
  std::fill(out, out + dv, 0.0);
  std::fill(error, error + dv, 0.0);
  for (const Pair& pair : row.seen) {
    const double* v = call.v.row(pair.k_row, hv);
    const double weight = pair.p * pair.kept;
    for (i64 c = 0; c < dv; ++c) {
      out[c] += weight * v[c];
      error[c] += (weight * relative + kTiny) * std::fabs(v[c]);
    }
  }
  for (i64 c = 0; c < dv; ++c) error[c] = written(call.args.q->dtype, out[c], error[c]);
}

ForwardWanted attend(const Call& call) {
  const i64 heads = call.q.heads, dv = call.v.dim;
  ForwardWanted wanted;
  wanted.out = Wanted(static_cast<size_t>(call.q.rows * heads * dv));
  wanted.lse = Wanted(static_cast<size_t>(call.q.rows * heads));
  std::fill(wanted.lse.value.begin(), wanted.lse.value.end(), kInf);  // rows of no sequence: out 0, LSE +inf
  for (i64 b = 0; b < static_cast<i64>(call.sequences.size()); ++b) {
    const Sequence& s = call.sequences[static_cast<size_t>(b)];
    for (i64 h = 0; h < heads; ++h) {
      for (i64 i = 0; i < static_cast<i64>(s.q_rows.size()); ++i) {
        const i64 q_row = s.q_rows[static_cast<size_t>(i)];
        const Row row = row_of(call, b, h, i);
        const size_t at = static_cast<size_t>((q_row * heads + h) * dv);
        output_row(call, row, h, wanted.out.value.data() + at, wanted.out.error.data() + at);
        wanted.lse.value[call.lse_index(q_row, h)] = row.lse;
        wanted.lse.error[call.lse_index(q_row, h)] = row.lse_error;
      }
    }
  }
  return wanted;
}

// Turns x by the table's row `position` (RoFormer, arXiv 2104.09864).
void turn(const strobe_kvcache_args& args, double* x, i64 position) {
  const i64 half = args.rotary_cos->shape[1];
  checked(position, args.rotary_cos->shape[0], "a position beyond the rotary table");
  const i64 size = size_of(args.rotary_cos->dtype);
  for (i64 c = 0; c < half; ++c) {
    const i64 at = (position * half + c) * size;
    const double cos = load(args.rotary_cos->dtype, static_cast<const char*>(args.rotary_cos->data) + at);
    const double sin = load(args.rotary_sin->dtype, static_cast<const char*>(args.rotary_sin->data) + at);
    double& a = x[args.rotary_interleaved ? 2 * c : c];
    double& b = x[args.rotary_interleaved ? 2 * c + 1 : c + half];
    const double turned = a * cos - b * sin;
    b = a * sin + b * cos;
    a = turned;
  }
}

}  // namespace

std::vector<Sequence> sequences_of(const strobe_args& args, i64 seqlen_new) {
  const bool packed_q = args.cu_seqlens_q, paged = args.page_table, packed_k = args.cu_seqlens_k && !paged;
  const i64 batch = packed_q ? args.cu_seqlens_q->shape[0] - 1 : args.q->shape[0];
  const i64 rows_q = packed_q ? args.q->shape[0] : args.q->shape[0] * args.q->shape[1];
  const i64 page_size = args.k->shape[args.k->ndim == 4 ? 1 : 0];
  std::vector<Sequence> sequences(static_cast<size_t>(batch));
  for (i64 b = 0; b < batch; ++b) {
    Sequence& s = sequences[static_cast<size_t>(b)];
    i64 begin = b * args.q->shape[1], rows = args.q->shape[1];
    if (packed_q) {
      begin = index_at(*args.cu_seqlens_q, b);
      rows = index_at(*args.cu_seqlens_q, b + 1) - begin;
    }
    if (rows < 0) throw Outside("cu_seqlens_q decreases");
    const i64 used_q = args.seqused_q ? index_at(*args.seqused_q, b) : rows;
    if (used_q < 0 || used_q > rows) throw Outside("seqused_q beyond its sequence");
    for (i64 i = 0; i < used_q; ++i) s.q_rows.push_back(checked(begin + i, rows_q, "a row beyond q"));

    const bool lengths = args.cu_seqlens_k && !(paged && args.seqused_k);
    i64 held = paged ? args.page_table->shape[1] * page_size : args.k->shape[1];
    if (lengths) held = index_at(*args.cu_seqlens_k, b + 1) - index_at(*args.cu_seqlens_k, b);
    const i64 used = args.seqused_k ? index_at(*args.seqused_k, b) + seqlen_new : held;
    const i64 leftpad = args.leftpad_k ? index_at(*args.leftpad_k, b) : 0;
    if (used < 0 || used > held || leftpad < 0 || leftpad > used) throw Outside("a length beyond the keys");
    s.first_new = used - seqlen_new;
    for (i64 row = std::min(leftpad, s.first_new); row < used; ++row) {
      i64 at;
      if (paged) {
        checked(row / page_size, args.page_table->shape[1], "a column beyond the page table");
        int32_t page;
        const i64 offset = (args.page_table->shape[0] > 1 ? b * args.page_table->stride[0] : 0) + row / page_size;
        std::memcpy(&page, static_cast<const char*>(args.page_table->data) + offset * 4, 4);
        at = checked(page, args.k->shape[0], "a page beyond the cache") * page_size + row % page_size;
      } else if (packed_k) {
        at = checked(index_at(*args.cu_seqlens_k, b) + row, args.k->shape[0], "a row beyond k");
      } else {
        const i64 entry = args.cache_batch_idx ? index_at(*args.cache_batch_idx, b) : b;
        at = checked(entry, args.k->shape[0], "an entry beyond the cache") * page_size + row;
      }
      if (row >= leftpad) s.k_rows.push_back(at);
      if (row >= s.first_new) s.new_k_rows.push_back(at);
    }
  }
  return sequences;
}

Wanted appended_k(const strobe_kvcache_args& args) {
  Wanted wanted;
  wanted.value = read(*args.k_new);
  wanted.error.assign(wanted.value.size(), 0);
  if (!args.rotary_cos) return wanted;
  const i64 seqlen_new = args.k_new->shape[1], heads = args.k_new->shape[2], dim = args.k_new->shape[3];
  const i64 turned = 2 * args.rotary_cos->shape[1];
  const auto sequences = sequences_of(args.fwd, seqlen_new);
  for (i64 n = 0; n < args.k_new->shape[0] * seqlen_new * heads; ++n) {
    const i64 b = n / heads / seqlen_new, i = n / heads % seqlen_new;
    double* x = wanted.value.data() + n * dim;
    double largest = 0;
    for (i64 c = 0; c < turned; ++c) largest = std::max(largest, std::fabs(x[c]));
    turn(args, x, sequences[static_cast<size_t>(b)].first_new + i);
    for (i64 c = 0; c < turned; ++c)
      wanted.error[static_cast<size_t>(n * dim + c)] = written(args.k_new->dtype, x[c], 8 * kRound32 * largest);
  }
  return wanted;
}

ForwardWanted forward(const strobe_args& args) { return attend(Call(args, 0)); }

ForwardWanted kvcache(const strobe_kvcache_args& args) {
  Call call(args.fwd, args.k_new ? args.k_new->shape[1] : 0);
  if (args.rotary_cos) {
    // Rows turn by their own position where the mask tells them apart, else all by the first new one.
    const strobe_args& a = args.fwd;
    const bool per_row = a.causal || a.window_left >= 0 || a.window_right >= 0;
    for (const Sequence& s : call.sequences)
      for (size_t i = 0; i < s.q_rows.size(); ++i)
        for (i64 h = 0; h < call.q.heads; ++h)
          turn(args, call.q.values.data() + call.q.index(s.q_rows[i], h), s.first_new + (per_row ? i64(i) : 0));
    call.q_error = 4 * rounding(a.q->dtype);
  }
  return attend(call);
}

BackwardWanted backward(const strobe_backward_args& args) {
  const Call call(args.fwd, 0);
  const Matrix dout(*args.dout);
  const std::vector<double> dlse = args.dlse ? read(*args.dlse) : std::vector<double>();
  const i64 heads = call.q.heads, d = call.q.dim, dv = call.v.dim;
  const double inside = 1.01 * rounding_inside(args.fwd.q->dtype);
  BackwardWanted wanted;
  wanted.dq = Wanted(call.q.values.size());
  wanted.dk = Wanted(call.k.values.size());
  wanted.dv = Wanted(call.v.values.size());
  wanted.ds_aux = Wanted(call.sinks.size());
  std::vector<double> out(static_cast<size_t>(dv)), out_error(static_cast<size_t>(dv));
  i64 longest = 0;
  for (const Sequence& s : call.sequences) longest = std::max(longest, static_cast<i64>(s.q_rows.size()));
  // Sums of dk and dv run over the queries of several heads.
  const double summing = double(longest * heads + 32) * kRound32;

  for (i64 b = 0; b < static_cast<i64>(call.sequences.size()); ++b) {
    const Sequence& s = call.sequences[static_cast<size_t>(b)];
    for (i64 h = 0; h < heads; ++h) {
      const i64 hk = h / (heads / call.k.heads), hv = h / (heads / call.v.heads);
      for (i64 i = 0; i < static_cast<i64>(s.q_rows.size()); ++i) {
        const i64 q_row = s.q_rows[static_cast<size_t>(i)];
        const Row row = row_of(call, b, h, i);
        if (row.lse == kInf) continue;
        output_row(call, row, h, out.data(), out_error.data());
        const double* q = call.q.row(q_row, h);
        const double* g = dout.row(q_row, h);
        const double from_lse = dlse.empty() ? 0 : dlse[call.lse_index(q_row, h)];
        const double delta = dot(out.data(), g, dv) - from_lse;
        const double delta_size = dot_sizes(out.data(), g, dv) + std::fabs(from_lse);
        const double delta_error = dot_sizes(out_error.data(), g, dv) + double(dv + 16) * kRound32 * delta_size;
        if (!call.sinks.empty()) {
          const size_t at = static_cast<size_t>(h);
          const double p = std::exp(call.sinks[at] - row.lse);
          wanted.ds_aux.value[at] -= p * delta;
          wanted.ds_aux.error[at] +=
              p * (delta_error + delta_size * (row.lse_error + kRound32 * (32 + 2 * std::fabs(call.sinks[at]))));
        }
        double* dq = wanted.dq.value.data() + call.q.index(q_row, h);
        double* dq_error = wanted.dq.error.data() + call.q.index(q_row, h);
        for (const Pair& pair : row.seen) {
          const double* k = call.k.row(pair.k_row, hk);
          const double* v = call.v.row(pair.k_row, hv);
          const double p_relative = pair.error + row.lse_error + 32 * kRound32 + inside;
          double* dv_at = wanted.dv.value.data() + call.v.index(pair.k_row, hv);
          double* dv_error = wanted.dv.error.data() + call.v.index(pair.k_row, hv);
          const double weight = pair.p * pair.kept, weight_error = weight * (p_relative + summing) + kTiny;
          for (i64 c = 0; c < dv; ++c) {
            dv_at[c] += weight * g[c];
            dv_error[c] += weight_error * std::fabs(g[c]);
          }
          const double dp = pair.kept * dot(v, g, dv), dp_size = pair.kept * dot_sizes(v, g, dv);
          const double size = dp_size + delta_size;
          const double ds = pair.p * (dp - delta) * pair.slope;
          const double ds_error =
              pair.p * (std::fabs(pair.slope) * (size * (p_relative + inside + summing) + delta_error +
                                                 double(dv + 16) * kRound32 * dp_size) +
                        pair.slope_error * size) +
              kTiny * size;
          double* dk = wanted.dk.value.data() + call.k.index(pair.k_row, hk);
          double* dk_error = wanted.dk.error.data() + call.k.index(pair.k_row, hk);
          const double many_keys = double(row.seen.size()) * kRound32 * pair.p * size * std::fabs(pair.slope);
          for (i64 c = 0; c < d; ++c) {
            dq[c] += ds * k[c];
            dq_error[c] += (ds_error + many_keys) * std::fabs(k[c]);
            dk[c] += ds * q[c];
            dk_error[c] += ds_error * std::fabs(q[c]);
          }
        }
      }
    }
  }
  for (Wanted* w : {&wanted.dq, &wanted.dk, &wanted.dv})
    for (size_t n = 0; n < w->value.size(); ++n)
      w->error[n] = w->error[n] == 0 ? 0 : written(args.fwd.q->dtype, w->value[n], w->error[n]);
  for (size_t n = 0; n < wanted.ds_aux.value.size(); ++n)
    wanted.ds_aux.error[n] += 4 * kRound32 * std::fabs(wanted.ds_aux.value[n]) + kTiny;
  return wanted;
}

}  // namespace fuzz
