// Checked arguments: turns the C ABI's structs into the engine's parameters, or into an error that a user can act on.
// Every user-facing check lives in this folder: problem.cpp runs them in order, check_*.cpp hold them.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "core/params.h"
#include "strobe/strobe.h"

namespace strobe {

struct Error : std::runtime_error {
  Error(strobe_status status, const std::string& text) : std::runtime_error(text), status(status) {}
  strobe_status status;
};

// Shapes of what the call writes, known before the outputs exist.
struct OutputShapes {
  int out_ndim = 0;
  int64_t out[4] = {};
  int lse_ndim = 0;
  int64_t lse[3] = {};
};

// Throw Error. `args.out` and `args.lse` may be null: then `shapes` says what to allocate, and bind_outputs sets them.
// s_aux in f16/bf16 is widened into `s_aux_storage` (num_heads floats, owned by the Problem).
struct ForwardProblem {
  AttnParams params;
  OutputShapes shapes;
  std::string s_aux_storage;  // bytes of the widened sinks; empty when s_aux is f32 or absent
};
struct BackwardProblem {
  BackwardParams params;
  std::string s_aux_storage;
};
struct KVCacheProblem {
  KVCacheParams params;
  OutputShapes shapes;
  std::string s_aux_storage;
};

void check_forward(const strobe_args& args, ForwardProblem& problem);
void check_backward(const strobe_backward_args& args, BackwardProblem& problem);
void check_kvcache(const strobe_kvcache_args& args, KVCacheProblem& problem);
// Freshly allocated, contiguous outputs of the shapes above.
void bind_outputs(AttnParams& params, void* out, float* lse);

}  // namespace strobe
