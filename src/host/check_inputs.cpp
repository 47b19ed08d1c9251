#include "host/check_arguments.h"

namespace strobe::host {
namespace {

void check_given(const Arguments& a, Named tensor) {
  if (!tensor) [[unlikely]] {
    a.call.refuse_value({a.q, a.k, a.v}, "%s is missing, allowed is a tensor", tensor.name);
  }
}

// Which of the three layouts each side has, and that the arguments that make it so come together.
void check_layout(const Arguments& a) {
  if (a.packed_q && !a.packed_k && !a.paged) [[unlikely]] {
    a.call.refuse_value({a.cu_seqlens_q}, "cu_seqlens_q is given but cu_seqlens_k is not, allowed is both or neither");
  }
  if (!a.packed_q && a.cu_seqlens_k) [[unlikely]] {
    a.call.refuse_value({a.cu_seqlens_k}, "cu_seqlens_k is given but cu_seqlens_q is not, allowed is both or neither");
  }
  if (a.paged && !a.seqused_k && !a.cu_seqlens_k) [[unlikely]] {
    a.call.refuse_value({a.page_table}, "page_table is given but %s is not, allowed is both or neither",
                        a.seqused_k.name);
  }
  if (!a.packed_q && a.q->ndim == 3) [[unlikely]] {
    a.call.refuse_value({a.q}, "q has 3 dimensions but cu_seqlens_q is not given, allowed is both (packed) or 4: %s",
                        "[batch, seqlen_q, num_heads, head_dim]");
  }
}

void check_ranks(const Arguments& a) {
  const char* dims = a.paged      ? "[num_pages, page_size, heads, dim]"
                     : a.packed_k ? "[total_k, heads, dim] with cu_seqlens_k"
                                  : "[batch, seqlen_k, heads, dim]";
  check_rank(
      a.call, a.q, a.packed_q ? 3 : 4,
      a.packed_q ? "[total_q, num_heads, head_dim] with cu_seqlens_q" : "[batch, seqlen_q, num_heads, head_dim]");
  check_rank(a.call, a.k, a.packed_k ? 3 : 4, dims);
  check_rank(a.call, a.v, a.packed_k ? 3 : 4, dims);
}

// Kernels read 16 bytes at a time.
void check_gpu_head_dim(const Call& call, Named tensor) {
  const long long dim = tensor->shape[tensor->ndim - 1];
  if (dim % 8 == 0) return;
  if (dim < 8)
    call.refuse_unsupported({tensor}, "head_dim of %s is %lld, allowed on a GPU is 8 and more", tensor.name, dim);
  call.refuse_unsupported({tensor},
                          "head_dim of %s is %lld, allowed on a GPU is a multiple of 8: the nearest are %lld and %lld",
                          tensor.name, dim, dim / 8 * 8, dim / 8 * 8 + 8);
}

void check_heads(const Arguments& a, const AttnParams& p) {
  const Call& call = a.call;
  for (Named t : {a.q, a.k, a.v}) {
    const int64_t* last = t->shape + t->ndim;
    if (last[-2] == 0) [[unlikely]]
      call.refuse_value({t}, "%s has 0 heads, allowed is at least 1", t.name);
    if (last[-1] == 0) [[unlikely]]
      call.refuse_value({t}, "head_dim of %s is 0, allowed is at least 1", t.name);
  }
  if (a.on_gpu()) {
    for (Named t : {a.q, a.v}) check_gpu_head_dim(call, t);
  }
  const int64_t head_dim_k = a.k->shape[a.k->ndim - 1];
  if (head_dim_k != p.head_dim) [[unlikely]] {
    call.refuse_value({a.q, a.k}, "head_dim of %s is %lld but of q is %lld, allowed is equal", a.k.name,
                      static_cast<long long>(head_dim_k), p.head_dim);
  }
  if (p.num_heads % p.num_heads_k != 0) [[unlikely]] {
    call.refuse_value({a.q, a.k}, "%s has %lld heads, allowed is a divisor of the %lld heads of q", a.k.name,
                      p.num_heads_k, p.num_heads);
  }
  if (p.num_heads % p.num_heads_v != 0) [[unlikely]] {
    call.refuse_value({a.q, a.v}, "%s has %lld heads, allowed is a divisor of the %lld heads of q", a.v.name,
                      p.num_heads_v, p.num_heads);
  }
}

void check_leading_sizes(const Arguments& a) {
  const Call& call = a.call;
  const char* first = a.paged ? "num_pages" : a.packed_k ? "total length" : "batch";
  if (a.k->shape[0] != a.v->shape[0]) [[unlikely]] {
    call.refuse_value({a.k, a.v}, "%s of %s is %lld but of %s is %lld, allowed is equal", first, a.v.name,
                      static_cast<long long>(a.v->shape[0]), a.k.name, static_cast<long long>(a.k->shape[0]));
  }
  if (a.packed_k) return;
  if (a.k->shape[1] != a.v->shape[1]) [[unlikely]] {
    call.refuse_value({a.k, a.v}, "%s of %s is %lld but of %s is %lld, allowed is equal",
                      a.paged ? "page_size" : "seqlen", a.v.name, static_cast<long long>(a.v->shape[1]), a.k.name,
                      static_cast<long long>(a.k->shape[1]));
  }
  if (a.paged) {
    if (a.k->shape[1] == 0) [[unlikely]]
      call.refuse_value({a.k}, "page_size of %s is 0, allowed is at least 1", a.k.name);
    if (a.on_gpu() && a.k->shape[1] % 8 != 0) [[unlikely]] {
      call.refuse_unsupported({a.k}, "page_size of %s is %lld, allowed on a GPU is a multiple of 8", a.k.name,
                              static_cast<long long>(a.k->shape[1]));
    }
  } else if (!a.cache_batch_idx && a.k->shape[0] != a.q->shape[0]) [[unlikely]] {
    call.refuse_value({a.q, a.k}, "batch of %s is %lld but of q is %lld, allowed is equal", a.k.name,
                      static_cast<long long>(a.k->shape[0]), static_cast<long long>(a.q->shape[0]));
  }
}

}  // namespace

Arguments::Arguments(const strobe_args& args, const char* default_function, bool kvcache)
    : call{args.function ? args.function : default_function},
      args(args),
      q{"q", args.q},
      k{kvcache ? "k_cache" : "k", args.k},
      v{kvcache ? "v_cache" : "v", args.v},
      out{"out", args.out},
      lse{"lse", args.lse},
      cu_seqlens_q{"cu_seqlens_q", args.cu_seqlens_q},
      cu_seqlens_k{"cu_seqlens_k", args.cu_seqlens_k},
      seqused_q{"seqused_q", args.seqused_q},
      seqused_k{kvcache ? "cache_seqlens" : "seqused_k", args.seqused_k},
      leftpad_k{kvcache ? "cache_leftpad" : "leftpad_k", args.leftpad_k},
      page_table{"page_table", args.page_table},
      cache_batch_idx{"cache_batch_idx", args.cache_batch_idx},
      full_from{"full_from", args.full_from},
      packed_q(args.cu_seqlens_q != nullptr),
      packed_k(args.cu_seqlens_k != nullptr && !args.page_table),
      paged(args.page_table != nullptr) {}

Rows rows_of(const strobe_tensor& tensor) {
  const int64_t* row = tensor.stride + tensor.ndim - 3;
  return {tensor.data, tensor.ndim == 4 ? tensor.stride[0] : 0, row[0], row[1]};
}

void check_inputs(const Arguments& a, AttnParams& p) {
  const Call& call = a.call;
  check_given(a, a.q);
  check_given(a, a.k);
  check_given(a, a.v);
  check_device(call, a.q, a.q);
  check_device(call, a.k, a.q);
  check_device(call, a.v, a.q);
  if (!is_float(a.q->dtype)) [[unlikely]] {
    call.refuse_type({a.q, a.k, a.v}, "q is %s, allowed is f32, f16 or bf16", dtype_name(a.q->dtype));
  }
  if (a.on_gpu() && a.q->dtype == STROBE_FLOAT32) [[unlikely]] {
    call.refuse_unsupported({a.q, a.k, a.v}, "q is f32, allowed on a GPU is f16 or bf16");
  }
  check_dtype(call, a.k, a.q->dtype, " as q is");
  check_dtype(call, a.v, a.q->dtype, " as q is");
  check_layout(a);
  check_ranks(a);
  check_memory(call, a.q);
  check_memory(call, a.k);
  check_memory(call, a.v);

  const int64_t* q = a.q->shape + a.q->ndim - 3;
  const int64_t* k = a.k->shape + a.k->ndim - 3;
  const int64_t* v = a.v->shape + a.v->ndim - 3;
  p.dtype = static_cast<DType>(a.q->dtype);
  p.num_heads = q[1];
  p.head_dim = q[2];
  p.num_heads_k = k[1];
  p.num_heads_v = v[1];
  p.head_dim_v = v[2];
  check_heads(a, p);
  check_leading_sizes(a);
  for (Named tensor : {a.q, a.k, a.v}) check_vectors(call, tensor);
  p.q = rows_of(*a.q.tensor);
  p.k = rows_of(*a.k.tensor);
  p.v = rows_of(*a.v.tensor);
  // What packed and paged calls have in place of these comes from the index tensors.
  p.batch = a.packed_q ? 0 : a.q->shape[0];
  p.seqlen_q = a.packed_q ? 0 : a.q->shape[1];
  p.total_q = a.packed_q ? a.q->shape[0] : a.q->shape[0] * a.q->shape[1];
  p.total_k = a.packed_k ? a.k->shape[0] : 0;
  p.cache_rows = a.packed_k || a.paged ? 0 : a.k->shape[0];
  p.seqlen_k = a.packed_k || a.paged ? 0 : a.k->shape[1];
}

}  // namespace strobe::host
