// The flat list of values that strobe/_extension.py hands over, turned into the C ABI's structs.
#pragma once

#include <array>

#include "python/python.h"

namespace strobe::python {

// Tensors first, each a torch.Tensor or None, then the options; `Side` and `Options` of _extension.py in the same
// order.
// clang-format off
enum Slot : int {
  kQ, kK, kV, kSAux, kOut,
  kCuSeqlensQ, kCuSeqlensK, kSequsedQ, kSequsedK, kLeftpadK, kPageTable, kCacheBatchIdx, kFullFrom, kAlibiSlopes,
  kTensors,
  kFunction = kTensors, kMaxSeqlenQ, kMaxSeqlenK, kSoftmaxScale, kSoftcap, kDropoutP, kCausal, kWindowSize, kKeepFirst,
  kForceFaDecode, kDeterministic, kBackend, kSeed, kOffset,
  kSlots,
};
// clang-format on
constexpr int kOptions = kSlots - kTensors;
constexpr int kSide = kTensors - kCuSeqlensQ;

// A call's tensors as the C ABI sees them; strobe_args points into it.
struct Call {
  strobe_args args;
  std::array<strobe_tensor, kTensors + 10> storage;
  int used = 0;

  Call() { strobe_args_init(&args); }
  // Null for None.
  const strobe_tensor* read(PyObject* tensor, const char* name);
};

// False where a value is of a type that only the Python side understands (an alias, a 0-dim tensor, numpy's integers);
// nothing is raised then.
bool read_options(PyObject* const* options, strobe_args& args);
// Every tensor must be None or a tensor with memory: TypeError otherwise.
void read_tensors(PyObject* const* tensors, Call& call);
// False where a tensor is not plain, has no memory, is a negated view, or q, k or v would have to be copied.
bool read_plain_tensors(PyObject* const* tensors, Call& call);

}  // namespace strobe::python
