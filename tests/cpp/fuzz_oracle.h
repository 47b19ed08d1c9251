// Attention by its definition (docs/masks.md), in double, one pair at a time, read from the call's own arguments. Every
// value comes with a bound of the error that rounding can cause in the engine.
#pragma once

#include <stdexcept>
#include <vector>

#include "fuzz_memory.h"

namespace fuzz {

// An argument leads outside of a tensor: a call that was accepted should have been refused.
struct Outside : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Per element of a tensor, row-major over its shape.
struct Wanted {
  std::vector<double> value, error;
  explicit Wanted(size_t n = 0) : value(n), error(n) {}
};

// Where one sequence lies: numbers of rows in q flattened to [rows, heads, dim], and in k and v alike.
struct Sequence {
  std::vector<i64> q_rows;  // that take part, in order
  std::vector<i64> k_rows;
  i64 first_new = 0;            // position in the cache of the first appended key
  std::vector<i64> new_k_rows;  // of k and v
};
std::vector<Sequence> sequences_of(const strobe_args& args, i64 seqlen_new);

struct ForwardWanted {
  Wanted out, lse;
};
struct BackwardWanted {
  Wanted dq, dk, dv, ds_aux;
};

// What appending leaves in the caches' new rows, numbered as sequences_of() does: [sequence][new key][head][dim].
Wanted appended_k(const strobe_kvcache_args& args);

ForwardWanted forward(const strobe_args& args);
// The caches hold the new keys already.
ForwardWanted kvcache(const strobe_kvcache_args& args);
BackwardWanted backward(const strobe_backward_args& args);

}  // namespace fuzz
