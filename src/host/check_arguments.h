// The parts of a call's check, in the order in which problem.cpp runs them. Each fills its part of AttnParams.
#pragma once

#include "host/check_tensor.h"
#include "host/problem.h"

namespace strobe::host {

// A call with its tensors under the names that the caller uses for them.
struct Arguments {
  Call call;
  const strobe_args& args;
  Named q, k, v, out, lse;
  Named cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, leftpad_k, page_table, cache_batch_idx, full_from;
  bool packed_q, packed_k, paged;

  Arguments(const strobe_args& args, const char* default_function, bool kvcache);

  // All tensors are where q is. On a GPU the values of index tensors stay unread: kernels clamp them.
  bool on_gpu() const { return q->device == STROBE_CUDA; }
};

// Presence, ranks, dtypes, devices, shapes and strides of q, k and v (check_inputs.cpp).
void check_inputs(const Arguments& a, AttnParams& params);
// Index tensors and their values (check_sequences.cpp). Needs params of check_inputs; seqlen_new must be set.
void check_sequences(const Arguments& a, AttnParams& params);
// Each cache row or page that new keys go to belongs to one sequence (check_sequences.cpp).
void check_append(const Arguments& a, const AttnParams& params);
// Scale, softcap, dropout, windows, ALiBi, sinks, backend (check_options.cpp).
void check_options(const Arguments& a, AttnParams& params, std::string& s_aux_storage);

Rows rows_of(const strobe_tensor& tensor);

}  // namespace strobe::host
