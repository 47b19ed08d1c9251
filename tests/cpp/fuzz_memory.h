// Tensors for the fuzzer: any strides, memory that is NaN before it is written, guards on both sides, and a memory of
// what every byte was, so that a call can be held to what it may write.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "strobe/strobe.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace fuzz {

using i64 = int64_t;
#if defined(__aarch64__)
using Half = __fp16;  // g++ 12 has no _Float16 in C++ there
#else
using Half = _Float16;
#endif

// The same numbers on every platform, which the distributions of <random> do not promise (SplitMix64).
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t next() {
    uint64_t z = state_ += 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
  }
  i64 range(i64 first, i64 last) { return first + static_cast<i64>(next() % static_cast<uint64_t>(last - first + 1)); }
  double uniform() { return static_cast<double>(next() >> 11) * 0x1p-53; }
  bool chance(double p) { return uniform() < p; }
  double normal() {  // near enough: twelve uniforms
    double sum = -6;
    for (int i = 0; i < 12; ++i) sum += uniform();
    return sum;
  }
  template <class T>
  T one_of(std::initializer_list<T> values) {
    return values.begin()[range(0, static_cast<i64>(values.size()) - 1)];
  }

 private:
  uint64_t state_;
};

inline i64 size_of(int32_t dtype) { return dtype == STROBE_FLOAT16 || dtype == STROBE_BFLOAT16 ? 2 : 4; }

inline double load(int32_t dtype, const char* at) {
  if (dtype == STROBE_FLOAT32) {
    float value;
    std::memcpy(&value, at, 4);
    return value;
  }
  uint16_t bits;
  std::memcpy(&bits, at, 2);
  if (dtype == STROBE_BFLOAT16) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
  }
  Half value;
  std::memcpy(&value, &bits, 2);
  return static_cast<double>(value);
}

inline void store(int32_t dtype, char* at, double value) {
  const float narrow = static_cast<float>(value);
  if (dtype == STROBE_FLOAT32) {
    std::memcpy(at, &narrow, 4);
  } else if (dtype == STROBE_BFLOAT16) {  // truncated: an input is what its bits say
    std::memcpy(at, reinterpret_cast<const char*>(&narrow) + 2, 2);
  } else {
    const Half half = static_cast<Half>(narrow);
    std::memcpy(at, &half, 2);
  }
}

// Elements of a view in row-major order of its shape: f(number, offset from data in elements).
template <class F>
void for_each_element(const strobe_tensor& t, F f) {
  i64 total = 1, index[STROBE_MAX_NDIM] = {};
  for (int i = 0; i < t.ndim; ++i) total *= t.shape[i];
  for (i64 n = 0; n < total; ++n) {
    i64 offset = 0;
    for (int i = 0; i < t.ndim; ++i)
      if (t.shape[i] > 1) offset += index[i] * t.stride[i];
    f(n, offset);
    for (int i = t.ndim - 1; i >= 0 && ++index[i] == t.shape[i]; --i) index[i] = 0;
  }
}

inline std::vector<double> read(const strobe_tensor& t) {
  std::vector<double> values;
  for_each_element(t, [&](i64, i64 at) {
    values.push_back(load(t.dtype, static_cast<const char*>(t.data) + at * size_of(t.dtype)));
  });
  return values;
}

class Tensor {
 public:
  strobe_tensor view{};
  std::string name;

  // `before` elements lie between the guard and the first element, so that data is aligned to one element only.
  Tensor(std::string name, int32_t dtype, const std::vector<i64>& shape, const std::vector<i64>& stride, i64 before)
      : name(std::move(name)) {
    view.dtype = dtype;
    view.device = STROBE_CPU;
    view.ndim = static_cast<int32_t>(shape.size());
    i64 last = 0;
    bool empty = false;
    for (size_t i = 0; i < shape.size(); ++i) {
      view.shape[i] = shape[i];
      view.stride[i] = stride[i];
      empty |= shape[i] == 0;
      if (shape[i] > 1) last += (shape[i] - 1) * stride[i];
    }
    begin_ = kGuard + before * size_of(dtype);
    end_ = begin_ + (empty ? 0 : last + 1) * size_of(dtype);
    bytes_ = (end_ + kGuard + 63) / 64 * 64;
    block_ = static_cast<char*>(std::aligned_alloc(64, static_cast<size_t>(bytes_)));
    std::memset(block_, 0xff, static_cast<size_t>(bytes_));  // NaN in every float type, -1 in int32
    view.data = block_ + begin_;
  }
  ~Tensor() {
    guard(false);
    std::free(block_);
  }
  Tensor(const Tensor&) = delete;
  Tensor& operator=(const Tensor&) = delete;

  char* at(i64 offset) { return block_ + begin_ + offset * size_of(view.dtype); }
  void set(i64 offset, double value) { store(view.dtype, at(offset), value); }
  void set_int(i64 offset, int32_t value) { std::memcpy(at(offset), &value, 4); }
  int32_t get_int(i64 offset) {
    int32_t value;
    std::memcpy(&value, at(offset), 4);
    return value;
  }

  // Under the address sanitizer nobody may touch what lies outside of the elements.
  void guard(bool on) {
#if defined(__SANITIZE_ADDRESS__)
    if (on) {
      ASAN_POISON_MEMORY_REGION(block_, static_cast<size_t>(begin_));
      ASAN_POISON_MEMORY_REGION(block_ + end_, static_cast<size_t>(bytes_ - end_));
    } else {
      ASAN_UNPOISON_MEMORY_REGION(block_, static_cast<size_t>(bytes_));
    }
#else
    (void)on;
#endif
  }
  void remember() { before_.assign(block_, block_ + bytes_); }
  void restore() { std::memcpy(block_, before_.data(), before_.size()); }
  std::vector<char> bytes() const { return {block_, block_ + bytes_}; }

  // True if nothing changed but elements that `may_change` marks, by offset from the first one.
  bool kept(const std::vector<bool>& may_change) const {
    if (may_change.empty()) return std::memcmp(block_, before_.data(), before_.size()) == 0;
    const i64 size = size_of(view.dtype);
    for (i64 byte = 0; byte < bytes_; ++byte) {
      const i64 element = (byte - begin_) / size;
      const bool inside = byte >= begin_ && byte < end_ && may_change[static_cast<size_t>(element)];
      if (!inside && block_[byte] != before_[static_cast<size_t>(byte)]) return false;
    }
    return true;
  }
  std::vector<bool> elements() const {
    std::vector<bool> mark(static_cast<size_t>((end_ - begin_) / size_of(view.dtype)) + 1);
    for_each_element(view, [&](i64, i64 at) { mark[static_cast<size_t>(at)] = true; });
    return mark;
  }

 private:
  static constexpr i64 kGuard = 64;
  char* block_;
  i64 begin_, end_, bytes_;
  std::vector<char> before_;
};

}  // namespace fuzz
