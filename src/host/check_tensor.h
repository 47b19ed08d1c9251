// Checks of one tensor, or of two against each other, and the words with which a call is refused.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "host/problem.h"

namespace strobe::host {

// A tensor under the name that the caller knows it by.
struct Named {
  const char* name;
  const strobe_tensor* tensor;

  explicit operator bool() const { return tensor != nullptr; }
  const strobe_tensor* operator->() const { return tensor; }
};

// The function whose call is checked. Text is built only where a call is refused: a valid call allocates nothing.
struct Call {
  const char* function;

  // Throw Error("<function>: <text> (<tensors shown>)").
  [[noreturn, gnu::cold, gnu::noinline, gnu::format(printf, 3, 4)]] void refuse_value(
      std::initializer_list<Named> shown, const char* format, ...) const;
  [[noreturn, gnu::cold, gnu::noinline, gnu::format(printf, 3, 4)]] void refuse_type(std::initializer_list<Named> shown,
                                                                                     const char* format, ...) const;
  [[noreturn, gnu::cold, gnu::noinline, gnu::format(printf, 3, 4)]] void refuse_unsupported(
      std::initializer_list<Named> shown, const char* format, ...) const;
};

using Shape = std::initializer_list<int64_t>;

bool is_float(int32_t dtype);
int64_t element_size(int32_t dtype);
const char* dtype_name(int32_t dtype);
bool has_shape(const strobe_tensor& tensor, Shape shape);

// Device, rank and dtype: the first things to hold, before a size or a stride means anything.
void check_device(const Call& call, Named tensor, Named reference);
void check_rank(const Call& call, Named tensor, int rank, const char* dims);
void check_dtype(const Call& call, Named tensor, int32_t dtype, const char* why);
// Sizes, strides, unit last stride, data pointer and its alignment. The rank must have been checked.
void check_memory(const Call& call, Named tensor);
// All of the above plus the exact shape; `dims` names it, such as "[batch, num_heads, seqlen_q]".
void check_tensor(const Call& call, Named tensor, Named reference, int32_t dtype, Shape shape, const char* dims);
// As check_tensor for an int32 tensor whose rows are read as they lie.
void check_index(const Call& call, Named tensor, Named reference, Shape shape, const char* dims);
// On a GPU, rows are read and written 16 bytes at a time. The shape must have been checked.
void check_vectors(const Call& call, Named tensor);
// No two elements of a tensor that is written may share memory.
void check_writable(const Call& call, Named tensor);
// A tensor that is written shares no memory with the other one. Interleaved views of one buffer pass.
void check_disjoint(const Call& call, Named written, Named other);

}  // namespace strobe::host
