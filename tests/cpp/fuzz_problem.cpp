#include "fuzz_problem.h"

#include <algorithm>
#include <cmath>

#include "fuzz_oracle.h"

namespace fuzz {

class Builder {
 public:
  Builder(Problem& problem, uint64_t seed, bool live) : p_(problem), a_(problem.args), r_(seed), live_(live) {}

  void build() {
    p_.kind = r_.chance(0.3) ? Kind::kForward : r_.chance(0.6) ? Kind::kBackward : Kind::kKVCache;
    strobe_args_init(&a_);
    strobe_backward_args_init(&p_.backward);
    strobe_kvcache_args_init(&p_.kvcache);
    pick_sizes();
    pick_layout();
    pick_options();
    make_outputs();
    if (live_)
      fill_live();
    else
      fill_all();
    for (Tensor& t : p_.tensors) t.remember();
  }

 private:
  // Mostly a few; 0 and 1 often; sometimes more than the engine's blocks of up to 192.
  i64 pick_length() {
    if (r_.chance(0.15)) return r_.range(0, 1);
    if (wide_ && r_.chance(0.5)) return r_.range(100, 420);
    return r_.chance(0.7) ? r_.range(1, 20) : r_.range(1, 80);
  }
  i64 pick_dim() {
    if (wide_) return r_.range(1, 20);
    return r_.chance(0.4)   ? r_.range(1, 16)
           : r_.chance(0.5) ? 8 * r_.range(1, 10)
                            : r_.range(1, r_.chance(0.1) ? 140 : 80);
  }
  i64 pick_divisor(i64 n) {
    i64 d;
    do d = r_.range(1, n);
    while (n % d);
    return d;
  }

  void pick_sizes() {
    wide_ = r_.chance(0.04);
    dtype_ = r_.one_of<int32_t>({STROBE_FLOAT32, STROBE_FLOAT16, STROBE_BFLOAT16});
    d_ = pick_dim();
    dv_ = r_.chance(0.4) ? d_ : pick_dim();
    heads_ = wide_ ? r_.range(1, 2) : r_.one_of<i64>({1, 2, 3, 4, 6, 8});
    heads_k_ = pick_divisor(heads_);
    heads_v_ = r_.chance(0.4) ? heads_k_ : pick_divisor(heads_);
    batch_ = wide_ ? r_.range(1, 2) : r_.chance(0.02) ? 0 : r_.range(1, 3);
    sq_ = p_.kind == Kind::kKVCache && r_.chance(0.6) ? r_.range(0, 4) : pick_length();
    sk_ = pick_length();
  }

  Tensor* add(const char* name, int32_t dtype, const std::vector<i64>& shape, const strobe_tensor** slot,
              bool written = false, const i64* strides = nullptr) {
    std::vector<i64> stride(shape.size());
    if (strides)
      std::copy(strides, strides + shape.size(), stride.begin());
    else
      pick_strides(shape, stride, written);
    p_.tensors.emplace_back(name, dtype, shape, stride, r_.range(0, 3));
    Tensor& t = p_.tensors.back();
    if (std::count(shape.begin(), shape.end(), 0) && r_.chance(0.5)) t.view.data = nullptr;
    *slot = &t.view;
    p_.arguments.push_back({&t, slot});
    return &t;
  }
  // Dimensions in any order, with gaps; inputs may repeat themselves; a dimension of size 1 may have any stride.
  void pick_strides(const std::vector<i64>& shape, std::vector<i64>& stride, bool written) {
    const int n = static_cast<int>(shape.size());
    std::vector<int> order;
    for (int i = n - 2; i >= 0; --i) order.push_back(i);
    if (r_.chance(0.4))
      for (size_t i = order.size(); i > 1; --i)
        std::swap(order[i - 1], order[static_cast<size_t>(r_.range(0, i64(i) - 1))]);
    stride[static_cast<size_t>(n - 1)] = 1;
    i64 span = std::max<i64>(1, shape[static_cast<size_t>(n - 1)]);
    for (int i : order) {
      const size_t at = static_cast<size_t>(i);
      if (r_.chance(0.15)) span += r_.range(1, 9);
      stride[at] = !written && r_.chance(0.03) ? 0 : span;
      if (stride[at]) span *= std::max<i64>(1, shape[at]);
    }
    for (size_t i = 0; i < shape.size(); ++i)
      if (shape[i] == 1 && r_.chance(0.1)) stride[i] = r_.one_of<i64>({0, -7, 12345, i64(1) << 40});
  }

  Tensor* add_ints(const char* name, const std::vector<i64>& values, const strobe_tensor** slot) {
    Tensor* t = add(name, STROBE_INT32, {static_cast<i64>(values.size())}, slot);
    for (size_t i = 0; i < values.size(); ++i) t->set_int(static_cast<i64>(i), static_cast<int32_t>(values[i]));
    return t;
  }

  void pick_layout() {
    const bool cache = p_.kind == Kind::kKVCache;
    const bool packed = !cache && r_.chance(0.4);
    const bool paged = r_.chance(0.3);
    capacity_.assign(static_cast<size_t>(batch_), sk_);
    rows_q_.assign(static_cast<size_t>(batch_), sq_);
    if (packed) {
      total_q_ = pack(rows_q_, "cu_seqlens_q", &a_.cu_seqlens_q);
      if (!paged) total_k_ = pack(capacity_, "cu_seqlens_k", &a_.cu_seqlens_k);
      add("q", dtype_, {total_q_, heads_, d_}, &a_.q);
    } else {
      add("q", dtype_, {batch_, sq_, heads_, d_}, &a_.q);
    }
    if (cache && r_.chance(0.7)) pick_new_keys();
    const bool appending = p_.kvcache.k_new;

    i64 page_size = 1, max_pages = 0, entries = batch_;
    if (paged) {
      page_size = r_.chance(0.3) ? r_.range(1, 3) : r_.chance(0.5) ? 16 : r_.range(1, 40);
      max_pages = (sk_ + new_ + page_size - 1) / page_size + (r_.chance(0.3) ? r_.range(1, 2) : 0);
      capacity_.assign(static_cast<size_t>(batch_), max_pages * page_size);
    } else if (cache && r_.chance(0.4)) {
      entries = batch_ + r_.range(0, 2);
      std::vector<i64> entry(static_cast<size_t>(entries));
      for (size_t i = 0; i < entry.size(); ++i) entry[i] = static_cast<i64>(i);
      shuffle(entry);
      entry.resize(static_cast<size_t>(batch_));
      if (!appending && batch_ > 1 && r_.chance(0.3)) entry[0] = entry[1];
      add_ints("cache_batch_idx", entry, &a_.cache_batch_idx);
    }
    if (cache && !paged) capacity_.assign(static_cast<size_t>(batch_), sk_ + new_);

    pick_used(paged, appending);
    if (paged) pick_pages(page_size, max_pages, appending);
    for (const bool is_v : {false, true}) {
      const i64 h = is_v ? heads_v_ : heads_k_, dim = is_v ? dv_ : d_;
      const strobe_tensor** slot = is_v ? &a_.v : &a_.k;
      const char* name = is_v ? "v" : "k";
      if (paged)
        add(name, dtype_, {pages_, page_size, h, dim}, slot, appending);
      else if (packed)
        add(name, dtype_, {total_k_, h, dim}, slot);
      else
        add(name, dtype_, {entries, cache ? sk_ + new_ : sk_, h, dim}, slot, appending);
    }
  }

  // Lengths of packed sequences; their bounds go into `name`. Returns the total.
  i64 pack(std::vector<i64>& lengths, const char* name, const strobe_tensor** slot) {
    std::vector<i64> bounds = {0};
    for (i64& n : lengths) {
      n = pick_length();
      bounds.push_back(bounds.back() + n);
    }
    add_ints(name, bounds, slot);
    return bounds.back();
  }

  void shuffle(std::vector<i64>& values) {
    for (size_t i = values.size(); i > 1; --i)
      std::swap(values[i - 1], values[static_cast<size_t>(r_.range(0, i64(i) - 1))]);
  }

  void pick_new_keys() {
    new_ = r_.chance(0.1) ? 0 : r_.range(1, 6);
    add("k_new", dtype_, {batch_, new_, heads_k_, d_}, &p_.kvcache.k_new);
    add("v_new", dtype_, {batch_, new_, heads_v_, dv_}, &p_.kvcache.v_new);
  }

  void pick_used(bool paged, bool appending) {
    const bool by_cu = paged && a_.cu_seqlens_q && r_.chance(0.3);
    if (by_cu) {  // lengths of paged keys by cu_seqlens_k
      std::vector<i64> bounds = {0};
      for (i64& n : capacity_) {
        n = r_.range(0, std::min(n, sk_));
        bounds.push_back(bounds.back() + n);
      }
      add_ints("cu_seqlens_k", bounds, &a_.cu_seqlens_k);
    }
    used_ = capacity_;
    if ((paged && !by_cu) || appending || (!by_cu && r_.chance(0.3))) {
      for (i64& n : used_) n = r_.chance(0.2) ? n - new_ : r_.range(0, n - new_);
      add_ints("seqused_k", used_, &a_.seqused_k);
      if (paged && a_.cu_seqlens_q && r_.chance(0.3)) {  // beside seqused_k it means nothing
        std::vector<i64> any(static_cast<size_t>(batch_ + 1));
        for (i64& n : any) n = static_cast<int32_t>(r_.next());
        add_ints("cu_seqlens_k", any, &a_.cu_seqlens_k);
      }
    }
    if (r_.chance(0.25)) {
      std::vector<i64> pad;
      for (i64 n : used_) pad.push_back(r_.chance(0.1) ? n : r_.range(0, n / 2));
      add_ints("leftpad_k", pad, &a_.leftpad_k);
    }
    if (p_.kind != Kind::kKVCache && r_.chance(0.25)) {
      std::vector<i64> rows;
      for (i64 n : rows_q_) rows.push_back(r_.range(0, n));
      add_ints("seqused_q", rows, &a_.seqused_q);
    }
  }

  // Every page that holds a key exists, the others are -1. Sequences may share pages that are only read.
  void pick_pages(i64 page_size, i64 max_pages, bool appending) {
    std::vector<i64> pages(static_cast<size_t>(batch_ * max_pages));
    pages_ = batch_ * max_pages + r_.range(0, 3);
    std::vector<i64> free(static_cast<size_t>(pages_));
    for (size_t i = 0; i < free.size(); ++i) free[i] = static_cast<i64>(i);
    shuffle(free);
    const bool share = r_.chance(0.2) && !appending && pages_ > 0;
    const i64 width = max_pages + r_.range(0, 2);  // of the table's memory
    const i64 stride[2] = {std::max<i64>(1, width), 1};
    Tensor* table = add("page_table", STROBE_INT32, {batch_, max_pages}, &a_.page_table, false, stride);
    for (i64 b = 0; b < batch_; ++b) {
      const size_t at = static_cast<size_t>(b);
      const i64 leftpad = a_.leftpad_k ? p_.find(a_.leftpad_k)->get_int(b) : 0;
      for (i64 column = 0; column < max_pages; ++column) {
        const bool holds = (column + 1) * page_size > leftpad && column * page_size < used_[at] + new_;
        const i64 page = share ? r_.range(0, pages_ - 1) : free[static_cast<size_t>(b * max_pages + column)];
        table->set_int(b * stride[0] + column, holds || r_.chance(0.1) ? static_cast<int32_t>(page) : -1);
      }
    }
  }

  void pick_options() {
    i64 longest_q = a_.cu_seqlens_q ? 0 : sq_, longest_k = a_.cu_seqlens_q ? 0 : sk_ + new_;
    for (i64 n : rows_q_) longest_q = std::max(longest_q, n);
    for (i64 n : capacity_) longest_k = std::max(longest_k, n);
    if (r_.chance(0.5)) a_.max_seqlen_q = longest_q + r_.range(0, 3);
    if (r_.chance(0.5)) a_.max_seqlen_k = longest_k + r_.range(0, 3);
    const i64 far = std::max(longest_q, longest_k) + 3;
    const auto bound = [&] { return r_.chance(0.5) ? r_.range(0, std::min<i64>(far, 12)) : r_.range(0, far); };
    a_.causal = r_.chance(0.4);
    if (r_.chance(0.5)) a_.window_left = bound();
    if (r_.chance(0.3)) a_.window_right = bound();
    if (r_.chance(0.4)) a_.keep_first = r_.chance(0.05) ? INT64_MAX : bound();
    a_.force_fa_decode = r_.chance(0.2);
    if (r_.chance(0.25)) {
      std::vector<i64> from;
      for (i64 n : rows_q_) from.push_back(r_.chance(0.1) ? INT32_MAX : r_.range(0, n + 1));
      add_ints("full_from", from, &a_.full_from);
    }
    if (r_.chance(0.3)) {
      a_.has_softmax_scale = 1;
      a_.softmax_scale = r_.chance(0.1) ? 0 : r_.chance(0.2) ? -0.2 : r_.uniform();
    }
    if (r_.chance(0.2))
      a_.softcap = 0.5 + 30 * r_.uniform();
    else if (p_.kind != Kind::kKVCache && r_.chance(0.3))
      a_.dropout_p = r_.chance(0.1) ? 0.9999 : r_.uniform() * 0.9;
    a_.seed = r_.next();
    a_.offset = r_.chance(0.5) ? r_.range(0, 100) : static_cast<i64>(r_.next());
    if (r_.chance(0.25)) {
      const bool per_batch = r_.chance(0.5);
      Tensor* t = add("alibi_slopes", STROBE_FLOAT32,
                      per_batch ? std::vector<i64>{batch_, heads_} : std::vector<i64>{heads_}, &a_.alibi_slopes);
      fill(*t, 0.3);
    }
    if (r_.chance(0.3)) {
      Tensor* t =
          add("s_aux", r_.one_of<int32_t>({STROBE_FLOAT32, STROBE_FLOAT16, STROBE_BFLOAT16}), {heads_}, &a_.s_aux);
      fill(*t, r_.chance(0.1) ? 40 : 2);
    }
    if (p_.kvcache.k_new && d_ >= 16 && r_.chance(0.5)) pick_rotary();
    a_.deterministic = r_.chance(0.2);
    a_.backend = r_.one_of<const char*>({nullptr, "auto", "cpu"});
  }

  void pick_rotary() {
    const i64 half = 8 * r_.range(1, d_ / 16);
    i64 rows = 0;
    for (i64 n : used_) rows = std::max(rows, n + std::max(new_, sq_));
    rows = std::max<i64>(rows, 1) + r_.range(0, 3);
    const i64 stride[2] = {half, 1};
    Tensor* cos = add("rotary_cos", dtype_, {rows, half}, &p_.kvcache.rotary_cos, false, stride);
    Tensor* sin = add("rotary_sin", dtype_, {rows, half}, &p_.kvcache.rotary_sin, false, stride);
    for (i64 at = 0; at < rows * half; ++at) {
      const double angle = double(at / half) * std::pow(1e4, -double(at % half) / double(half));
      cos->set(at, std::cos(angle));
      sin->set(at, std::sin(angle));
    }
    p_.kvcache.rotary_interleaved = r_.chance(0.5);
  }

  void make_outputs() {
    const bool packed = a_.cu_seqlens_q, gradients = p_.kind == Kind::kBackward;
    const std::vector<i64> out =
        packed ? std::vector<i64>{total_q_, heads_, dv_} : std::vector<i64>{batch_, sq_, heads_, dv_};
    const std::vector<i64> lse = packed ? std::vector<i64>{heads_, total_q_} : std::vector<i64>{batch_, heads_, sq_};
    add("out", dtype_, out, &a_.out, true);
    if (gradients || r_.chance(0.8)) add("lse", STROBE_FLOAT32, lse, &a_.lse, true);
    if (!gradients) return;
    strobe_backward_args& b = p_.backward;
    add("dout", dtype_, out, &b.dout);
    if (r_.chance(0.5)) add("dlse", STROBE_FLOAT32, lse, &b.dlse, true, a_.lse->stride);
    const auto like = [&](const char* name, const strobe_tensor* t, const strobe_tensor** slot) {
      add(name, dtype_, std::vector<i64>(t->shape, t->shape + t->ndim), slot, true);
    };
    like("dq", a_.q, &b.dq);
    like("dk", a_.k, &b.dk);
    like("dv", a_.v, &b.dv);
    if (a_.s_aux) add("ds_aux", STROBE_FLOAT32, {heads_}, &b.ds_aux, true);
  }

  void fill(Tensor& t, double size) {
    for_each_element(t.view, [&](i64, i64 at) { t.set(at, size * r_.normal()); });
  }
  void fill_all() {
    for (const strobe_tensor* view :
         {a_.q, a_.k, a_.v, p_.kvcache.k_new, p_.kvcache.v_new, p_.backward.dout, p_.backward.dlse})
      if (view) fill(*p_.find(view), 1);
  }
  // Rows of sequences only: what lies between, before and behind them stays NaN.
  void fill_live() {
    const double size_q = r_.chance(0.1) ? 6 : 1;
    for (const Sequence& s : sequences_of(a_, new_)) {
      const std::vector<i64> old(s.k_rows.begin(), s.k_rows.end() - std::min<i64>(new_, i64(s.k_rows.size())));
      fill_rows(a_.q, s.q_rows, size_q);
      fill_rows(a_.k, old, 1);
      fill_rows(a_.v, old, 1);
      if (p_.kind != Kind::kBackward) continue;
      fill_rows(p_.backward.dout, s.q_rows, 1);
      if (p_.backward.dlse) fill_lse_rows(p_.backward.dlse, s.q_rows);
    }
    for (const strobe_tensor* view : {p_.kvcache.k_new, p_.kvcache.v_new})
      if (view) fill(*p_.find(view), 1);
  }
  void fill_rows(const strobe_tensor* view, const std::vector<i64>& rows, double size) {
    Tensor& t = *p_.find(view);
    const i64 heads = view->shape[view->ndim - 2], dim = view->shape[view->ndim - 1];
    mark_.assign(static_cast<size_t>(view->ndim == 3 ? view->shape[0] : view->shape[0] * view->shape[1]), false);
    for (i64 row : rows) mark_[static_cast<size_t>(row)] = true;
    for_each_element(t.view, [&](i64 n, i64 at) {
      if (mark_[static_cast<size_t>(n / (heads * dim))]) t.set(at, size * r_.normal());
    });
  }
  void fill_lse_rows(const strobe_tensor* view, const std::vector<i64>& rows) {
    Tensor& t = *p_.find(view);
    const bool packed = view->ndim == 2;
    const i64 length = view->shape[view->ndim - 1];
    mark_.assign(static_cast<size_t>(packed ? length : view->shape[0] * length), false);
    for (i64 row : rows) mark_[static_cast<size_t>(row)] = true;
    for_each_element(t.view, [&](i64 n, i64 at) {
      const i64 row = packed ? n % length : n / length / heads_ * length + n % length;
      if (mark_[static_cast<size_t>(row)]) t.set(at, 0.5 * r_.normal());
    });
  }

  Problem& p_;
  strobe_args& a_;
  Random r_;
  const bool live_;
  bool wide_ = false;
  int32_t dtype_ = STROBE_FLOAT32;
  i64 d_ = 1, dv_ = 1, heads_ = 1, heads_k_ = 1, heads_v_ = 1, batch_ = 1, sq_ = 1, sk_ = 1, new_ = 0;
  i64 total_q_ = 0, total_k_ = 0, pages_ = 0;
  std::vector<i64> rows_q_, capacity_, used_;  // per sequence; used_ before appending
  std::vector<bool> mark_;
};

Problem::Problem(uint64_t seed, bool live) { Builder(*this, seed, live).build(); }

Tensor* Problem::find(const strobe_tensor* view) {
  for (Tensor& t : tensors)
    if (&t.view == view) return &t;
  return nullptr;
}

double Problem::cost() const {
  const strobe_tensor &q = *args.q, &k = *args.k;
  const double rows_q = q.ndim == 3 ? double(q.shape[0]) : double(q.shape[0] * q.shape[1]);
  const double keys = args.page_table ? double(args.page_table->shape[1] * k.shape[1]) : double(k.shape[k.ndim == 4]);
  return rows_q * keys * double(q.shape[q.ndim - 2] * (q.shape[q.ndim - 1] + args.v->shape[args.v->ndim - 1]));
}

std::vector<Tensor*> Problem::outputs() {
  std::vector<Tensor*> found;
  const bool gradients = kind == Kind::kBackward;
  for (const strobe_tensor* view : {args.out, args.lse, backward.dq, backward.dk, backward.dv, backward.ds_aux})
    if (view && (gradients || view == args.out || view == args.lse)) found.push_back(find(view));
  return found;
}

std::string Problem::text() const {
  std::string s = kind == Kind::kForward ? "forward" : kind == Kind::kBackward ? "backward" : "kvcache";
  const char* dtypes[] = {"?", " f32", " f16", " bf16"};
  s += dtypes[args.q->dtype & 3];
  for (const Tensor& t : tensors) {
    s += "\n  " + t.name + " [";
    for (int i = 0; i < t.view.ndim; ++i) s += (i ? ", " : "") + std::to_string(t.view.shape[i]);
    s += "] strides (";
    for (int i = 0; i < t.view.ndim; ++i) s += (i ? ", " : "") + std::to_string(t.view.stride[i]);
    s += ")";
    if (t.view.dtype != STROBE_INT32) continue;
    s += " =";
    for_each_element(t.view, [&](i64, i64 at) { s += " " + std::to_string(const_cast<Tensor&>(t).get_int(at)); });
  }
  s += "\n  causal " + std::to_string(args.causal) + " window (" + std::to_string(args.window_left) + ", " +
       std::to_string(args.window_right) + ") keep_first " + std::to_string(args.keep_first) + " force_fa_decode " +
       std::to_string(args.force_fa_decode) + " scale " +
       (args.has_softmax_scale ? std::to_string(args.softmax_scale) : "-") + " softcap " +
       std::to_string(args.softcap) + " dropout_p " + std::to_string(args.dropout_p);
  return s;
}

}  // namespace fuzz
