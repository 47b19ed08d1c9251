// One random call and the memory behind it.
#pragma once

#include <deque>
#include <string>
#include <vector>

#include "fuzz_memory.h"

namespace fuzz {

enum class Kind { kForward, kBackward, kKVCache };

// The tensor arguments of a call by name, so that a hostile hand can reach each of them.
struct Argument {
  Tensor* tensor;
  const strobe_tensor** slot;
};

struct Problem {
  Kind kind;
  strobe_args args;               // every call's; copied into the two below before they run
  strobe_backward_args backward;  // of kBackward
  strobe_kvcache_args kvcache;    // of kKVCache
  std::deque<Tensor> tensors;
  std::vector<Argument> arguments;

  // Valid, over all features together. `live` fills only what takes part; all else stays NaN.
  Problem(uint64_t seed, bool live);
  Problem(const Problem&) = delete;

  Tensor* find(const strobe_tensor* view);
  bool appends() const { return kind == Kind::kKVCache && kvcache.k_new; }
  i64 seqlen_new() const { return appends() ? kvcache.k_new->shape[1] : 0; }
  // Multiply-adds, roughly.
  double cost() const;
  std::string text() const;
  // What out, lse and the gradients are written through; caches that grow are not among them.
  std::vector<Tensor*> outputs();

 private:
  friend class Builder;
};

// Spoils a valid problem: garbage in index tensors, in scalars, in tensor descriptors. It never claims memory that is
// not there. True if the call must be refused.
bool spoil(Problem& problem, Random& random, std::string& what);

}  // namespace fuzz
