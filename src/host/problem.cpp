#include "host/problem.h"

#include <algorithm>

#include "host/check_arguments.h"

namespace strobe {
namespace {

using host::Arguments;
using host::Named;
using host::Shape;

// A struct of another size is of another version: none of its fields may be read, the function's name included.
void check_struct(const char* function, const char* name, size_t given, size_t allowed) {
  if (given != allowed) [[unlikely]] {
    host::Call{function}.refuse_value({}, "struct_size of %s is %zu, allowed is %zu as %s_init sets it", name, given,
                                      allowed, name);
  }
}

Rows rows_like_q(const Arguments& a, Named tensor, int64_t dim, const char* dims) {
  const host::Call& call = a.call;
  if (a.packed_q) {
    host::check_tensor(call, tensor, a.q, a.q->dtype, {a.q->shape[0], a.q->shape[1], dim}, dims);
  } else {
    host::check_tensor(call, tensor, a.q, a.q->dtype, {a.q->shape[0], a.q->shape[1], a.q->shape[2], dim}, dims);
  }
  host::check_vectors(call, tensor);
  return host::rows_of(*tensor.tensor);
}

Rows rows_like_out(const Arguments& a, Named tensor, const AttnParams& p) {
  return rows_like_q(a, tensor, p.head_dim_v,
                     a.packed_q ? "[total_q, num_heads, head_dim_v]" : "[batch, seqlen_q, num_heads, head_dim_v]");
}

// A gradient has the shape and dtype of its input.
Rows rows_like(const Arguments& a, Named tensor, Named input, const char* dims) {
  const int64_t* s = input->shape;
  if (input->ndim == 3) {
    host::check_tensor(a.call, tensor, input, a.q->dtype, {s[0], s[1], s[2]}, dims);
  } else {
    host::check_tensor(a.call, tensor, input, a.q->dtype, {s[0], s[1], s[2], s[3]}, dims);
  }
  host::check_vectors(a.call, tensor);
  host::check_writable(a.call, tensor);
  return host::rows_of(*tensor.tensor);
}

void check_lse_like(const Arguments& a, Named tensor, const AttnParams& p) {
  if (a.packed_q) {
    host::check_tensor(a.call, tensor, a.q, STROBE_FLOAT32, {p.num_heads, p.total_q}, "[num_heads, total_q]");
  } else {
    host::check_tensor(a.call, tensor, a.q, STROBE_FLOAT32, {p.batch, p.num_heads, p.seqlen_q},
                       "[batch, num_heads, seqlen_q]");
  }
}

void bind_lse(const Arguments& a, AttnParams& p) {
  check_lse_like(a, a.lse, p);
  const strobe_tensor& lse = *a.lse.tensor;
  p.lse = static_cast<float*>(lse.data);
  p.lse_batch_stride = a.packed_q ? 0 : lse.stride[0];
  p.lse_head_stride = lse.stride[a.packed_q ? 0 : 1];
}

void fill_shapes(const Arguments& a, const AttnParams& p, OutputShapes& shapes) {
  int n = 0;
  for (int i = 0; i + 1 < a.q->ndim; ++i) shapes.out[n++] = a.q->shape[i];
  shapes.out[n++] = p.head_dim_v;
  shapes.out_ndim = n;
  n = 0;
  if (!a.packed_q) shapes.lse[n++] = p.batch;
  shapes.lse[n++] = p.num_heads;
  shapes.lse[n++] = a.packed_q ? p.total_q : p.seqlen_q;
  shapes.lse_ndim = n;
}

// Tables that lay in what the call writes would change while they lead through the tensors.
void check_apart_from_tables(const Arguments& a, const AttnParams& p, Named written) {
  const Named slopes{"alibi_slopes", a.args.alibi_slopes}, sinks{"s_aux", a.args.s_aux};
  for (Named table : {a.cu_seqlens_q, p.cu_seqlens_k ? a.cu_seqlens_k : Named{}, a.seqused_q, a.seqused_k, a.leftpad_k,
                      a.page_table, a.cache_batch_idx, a.full_from, slopes, sinks})
    host::check_disjoint(a.call, written, table);
}

void check_written(const Arguments& a, AttnParams& p) {
  if (a.out) {
    p.out = rows_like_out(a, a.out, p);
    host::check_writable(a.call, a.out);
    for (Named input : {a.q, a.k, a.v}) host::check_disjoint(a.call, a.out, input);
  }
  if (a.lse) {
    bind_lse(a, p);
    host::check_writable(a.call, a.lse);
    for (Named other : {a.q, a.k, a.v, a.out}) host::check_disjoint(a.call, a.lse, other);
  }
  for (Named written : {a.out, a.lse}) check_apart_from_tables(a, p, written);
}

void refuse_given(const Arguments& a, Named tensor, const char* where) {
  if (tensor) [[unlikely]]
    a.call.refuse_value({tensor}, "%s is given, allowed is none %s", tensor.name, where);
}

void check_present(const Arguments& a, Named tensor) {
  if (!tensor) [[unlikely]]
    a.call.refuse_value({a.q}, "%s is missing, allowed is a tensor", tensor.name);
}

// What the caches gain: k_new and v_new, checked against q and the caches.
void check_new_keys(const Arguments& a, const strobe_kvcache_args& args, KVCacheParams& problem) {
  const Named k{"k_new", args.k_new}, v{"v_new", args.v_new};
  const host::Call& call = a.call;
  if (!k && !v) return;
  if (!k || !v) [[unlikely]] {
    call.refuse_value({k, v}, "%s is given but %s is not, allowed is both or neither", k ? k.name : v.name,
                      k ? v.name : k.name);
  }
  if (!a.seqused_k) [[unlikely]] {
    call.refuse_value({k}, "k_new is given but %s is not, allowed is both or no new keys", a.seqused_k.name);
  }
  const AttnParams& p = problem.fwd;
  host::check_rank(call, k, 4, "[batch, seqlen_new, num_heads_k, head_dim]");
  host::check_tensor(call, k, a.q, a.q->dtype, {p.batch, k->shape[1], p.num_heads_k, p.head_dim},
                     "[batch, seqlen_new, num_heads_k, head_dim]");
  host::check_tensor(call, v, k, a.q->dtype, {p.batch, k->shape[1], p.num_heads_v, p.head_dim_v},
                     "[batch, seqlen_new, num_heads_v, head_dim_v]");
  for (Named fresh : {k, v}) host::check_vectors(call, fresh);
  problem.fwd.seqlen_new = k->shape[1];
  problem.k_new = host::rows_of(*k.tensor);
  problem.v_new = host::rows_of(*v.tensor);
  if (!problem.fwd.seqlen_new) return;
  for (Named cache : {a.k, a.v}) {
    host::check_writable(call, cache);
    for (Named other : {a.q, k, v}) host::check_disjoint(call, cache, other);
  }
  host::check_disjoint(call, a.k, a.v);
}

void check_rotary(const Arguments& a, const strobe_kvcache_args& args, KVCacheParams& problem) {
  const Named cos{"rotary_cos", args.rotary_cos}, sin{"rotary_sin", args.rotary_sin};
  const host::Call& call = a.call;
  if (!cos && !sin) return;
  if (!cos || !sin) [[unlikely]] {
    call.refuse_value({cos, sin}, "%s is given but %s is not, allowed is both or neither", cos ? cos.name : sin.name,
                      cos ? sin.name : cos.name);
  }
  if (!args.k_new) [[unlikely]] {
    call.refuse_value({cos, sin}, "rotary_cos is given but k_new is not, allowed is rotary only with new keys");
  }
  const AttnParams& p = problem.fwd;
  host::check_rank(call, cos, 2, "[seqlen_ro, rotary_dim / 2]");
  const int64_t rows = cos->shape[0], half = cos->shape[1];
  host::check_tensor(call, cos, a.q, a.q->dtype, {rows, half}, "[seqlen_ro, rotary_dim / 2]");
  host::check_tensor(call, sin, cos, a.q->dtype, {rows, half}, "[seqlen_ro, rotary_dim / 2]");
  for (Named table : {cos, sin}) {
    if (rows > 1 && half > 0 && table->stride[0] != half) [[unlikely]] {
      call.refuse_value({table}, "%s has row stride %lld, allowed is contiguous, %lld", table.name,
                        static_cast<long long>(table->stride[0]), static_cast<long long>(half));
    }
  }
  problem.rotary_dim = 2 * half;
  if (problem.rotary_dim == 0 || problem.rotary_dim % 16 != 0 || problem.rotary_dim > p.head_dim) [[unlikely]] {
    call.refuse_value({cos, a.q}, "rotary_dim is %lld, allowed is a multiple of 16 from 16 to head_dim %lld",
                      problem.rotary_dim, p.head_dim);
  }
  // Query rows share one position unless the mask tells them apart.
  const i64 turned_q =
      p.causal || p.window_left >= 0 || p.window_right >= 0 ? p.seqlen_q : std::min<i64>(1, p.seqlen_q);
  for (i64 b = 0; b < p.batch && !a.on_gpu(); ++b) {
    const i64 needed = p.seqused_k[b] + std::max(p.seqlen_new, turned_q);
    if (needed > rows) [[unlikely]] {
      call.refuse_value(
          {cos, a.seqused_k},
          "rotary_cos has %lld rows but sequence %lld reaches position %lld, allowed is at least %lld rows",
          static_cast<long long>(rows), b, needed - 1, needed);
    }
  }
  problem.rotary_cos = cos->data;
  problem.rotary_sin = sin->data;
  problem.seqlen_ro = rows;
  problem.rotary_interleaved = args.rotary_interleaved != 0;
}

}  // namespace

void check_forward(const strobe_args& args, ForwardProblem& problem) {
  check_struct("strobe_forward", "strobe_args", args.struct_size, sizeof args);
  const Arguments a(args, "strobe_forward", false);
  AttnParams& p = problem.params;
  host::check_inputs(a, p);
  refuse_given(a, a.cache_batch_idx, "outside of a call with a cache");
  host::check_sequences(a, p);
  host::check_options(a, p, problem.s_aux_storage);
  fill_shapes(a, p, problem.shapes);
  check_written(a, p);
}

void check_backward(const strobe_backward_args& args, BackwardProblem& problem) {
  check_struct("strobe_backward", "strobe_backward_args", args.struct_size, sizeof args);
  check_struct("strobe_backward", "strobe_args", args.fwd.struct_size, sizeof args.fwd);
  const Arguments a(args.fwd, "strobe_backward", false);
  AttnParams& p = problem.params.fwd;
  host::check_inputs(a, p);
  refuse_given(a, a.cache_batch_idx, "where gradients are computed");
  host::check_sequences(a, p);
  host::check_options(a, p, problem.s_aux_storage);

  const Named dout{"dout", args.dout}, dlse{"dlse", args.dlse};
  const Named dq{"dq", args.dq}, dk{"dk", args.dk}, dv{"dv", args.dv}, ds_aux{"ds_aux", args.ds_aux};
  for (Named tensor : {a.out, a.lse, dout, dq, dk, dv}) check_present(a, tensor);
  p.out = rows_like_out(a, a.out, p);
  bind_lse(a, p);
  problem.params.dout = rows_like_out(a, dout, p);
  problem.params.deterministic = args.fwd.deterministic != 0;
  if (dlse) {
    check_lse_like(a, dlse, p);
    for (int i = 0; i < dlse->ndim; ++i) {
      if (dlse->shape[i] > 1 && dlse->stride[i] != a.lse->stride[i]) [[unlikely]] {
        a.call.refuse_value({dlse, a.lse}, "dlse has stride %lld in dimension %d, allowed is %lld as lse has",
                            static_cast<long long>(dlse->stride[i]), i, static_cast<long long>(a.lse->stride[i]));
      }
    }
    problem.params.dlse = static_cast<const float*>(dlse->data);
  }
  problem.params.dq = rows_like(a, dq, a.q, "the shape of q");
  problem.params.dk = rows_like(a, dk, a.k, "the shape of k");
  problem.params.dv = rows_like(a, dv, a.v, "the shape of v");
  if (args.fwd.s_aux) {
    check_present(a, ds_aux);
    host::check_tensor(a.call, ds_aux, a.q, STROBE_FLOAT32, {p.num_heads}, "[num_heads]");
    host::check_writable(a.call, ds_aux);
    problem.params.ds_aux = static_cast<float*>(ds_aux->data);
  } else {
    refuse_given(a, ds_aux, "without s_aux");
  }
  for (Named written : {dq, dk, dv, ds_aux}) {
    for (Named read : {a.q, a.k, a.v, a.out, a.lse, dout, dlse}) host::check_disjoint(a.call, written, read);
    check_apart_from_tables(a, p, written);
  }
  host::check_disjoint(a.call, dq, dk);
  host::check_disjoint(a.call, dq, dv);
  host::check_disjoint(a.call, dk, dv);
  for (Named gradient : {dq, dk, dv}) host::check_disjoint(a.call, ds_aux, gradient);
}

void check_kvcache(const strobe_kvcache_args& args, KVCacheProblem& problem) {
  check_struct("strobe_kvcache", "strobe_kvcache_args", args.struct_size, sizeof args);
  check_struct("strobe_kvcache", "strobe_args", args.fwd.struct_size, sizeof args.fwd);
  const Arguments a(args.fwd, "strobe_kvcache", true);
  KVCacheParams& params = problem.params;
  AttnParams& p = params.fwd;
  for (Named tensor : {a.cu_seqlens_q, a.cu_seqlens_k, a.seqused_q}) refuse_given(a, tensor, "in a call with a cache");
  host::check_inputs(a, p);
  check_new_keys(a, args, params);
  host::check_sequences(a, p);
  host::check_append(a, p);
  host::check_options(a, p, problem.s_aux_storage);
  if (p.dropout_p > 0) [[unlikely]] {
    a.call.refuse_value({}, "dropout_p is %g, allowed is 0 in a call with a cache", static_cast<double>(p.dropout_p));
  }
  check_rotary(a, args, params);
  fill_shapes(a, p, problem.shapes);
  check_written(a, p);
  if (params.k_new.data) {
    for (Named fresh : {Named{"k_new", args.k_new}, Named{"v_new", args.v_new}}) {
      host::check_disjoint(a.call, a.out, fresh);
      host::check_disjoint(a.call, a.lse, fresh);
    }
  }
  if (p.seqlen_new) {
    for (Named cache : {a.k, a.v}) check_apart_from_tables(a, p, cache);
  }
}

void bind_outputs(AttnParams& params, void* out, float* lse) {
  const i64 row = params.num_heads * params.head_dim_v;
  const bool packed = params.cu_seqlens_q != nullptr;
  params.out = {out, packed ? 0 : params.seqlen_q * row, row, params.head_dim_v};
  params.lse = lse;
  params.lse_head_stride = packed ? params.total_q : params.seqlen_q;
  params.lse_batch_stride = packed ? 0 : params.num_heads * params.seqlen_q;
}

}  // namespace strobe
