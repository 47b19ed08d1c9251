#include "host/check_tensor.h"

#include <cstdarg>
#include <cstdio>
#include <string>

namespace strobe::host {
namespace {

// Far above any real tensor, low enough that offsets cannot overflow 64 bits.
constexpr int64_t kMaxSize = INT64_C(1) << 40;
constexpr int64_t kMaxExtent = INT64_C(1) << 58;

std::string shape_text(const strobe_tensor& tensor) {
  std::string text = "[";
  const int ndim = tensor.ndim < 0 ? 0 : tensor.ndim > STROBE_MAX_NDIM ? STROBE_MAX_NDIM : tensor.ndim;
  for (int i = 0; i < ndim; ++i) text += (i ? ", " : "") + std::to_string(tensor.shape[i]);
  return text + "]";
}

std::string device_text(const strobe_tensor& tensor) {
  if (tensor.device == STROBE_CPU) return "cpu";
  if (tensor.device == STROBE_CUDA) return "cuda:" + std::to_string(tensor.device_index);
  return "a device that Strobe does not know";
}

std::string message(const char* function, std::initializer_list<Named> shown, const char* format, va_list values) {
  char text[1024];
  std::vsnprintf(text, sizeof text, format, values);
  std::string result = std::string(function) + ": " + text;
  const char* separator = " (";
  for (const Named& named : shown) {
    if (!named) continue;
    result += separator;
    result += std::string(named.name) + " " + shape_text(*named.tensor) + " " + dtype_name(named->dtype);
    separator = ", ";
  }
  if (separator[0] == ',') result += ")";
  return result;
}

bool is_empty(const strobe_tensor& tensor) {
  for (int i = 0; i < tensor.ndim; ++i) {
    if (tensor.shape[i] == 0) return true;
  }
  return false;
}

// Elements from the first to behind the last one, over the dims whose stride is below `below`.
int64_t extent(const strobe_tensor& tensor, int64_t below = INT64_MAX) {
  int64_t last = 0;
  for (int i = 0; i < tensor.ndim; ++i) {
    if (tensor.shape[i] > 1 && tensor.stride[i] < below) last += (tensor.shape[i] - 1) * tensor.stride[i];
  }
  return last + 1;
}

bool strides_are_multiples(const strobe_tensor& tensor, int64_t period) {
  for (int i = 0; i < tensor.ndim; ++i) {
    if (tensor.shape[i] > 1 && tensor.stride[i] >= period && tensor.stride[i] % period != 0) return false;
  }
  return true;
}

// Views such as qkv[:, :, 0] and qkv[:, :, 1] reach over each other without sharing an element: each stays inside its
// own residues modulo a stride that divides all larger strides of both.
[[gnu::cold]] bool interleaved(const strobe_tensor& a, const strobe_tensor& b) {
  const int64_t size = element_size(a.dtype);
  if (size != element_size(b.dtype)) return false;
  const int64_t bytes = static_cast<char*>(b.data) - static_cast<char*>(a.data);
  if (bytes % size != 0) return false;
  for (int i = 0; i < a.ndim; ++i) {
    const int64_t period = a.stride[i];
    if (a.shape[i] <= 1 || period <= 1) continue;
    if (!strides_are_multiples(a, period) || !strides_are_multiples(b, period)) continue;
    const int64_t shift = ((bytes / size) % period + period) % period;
    if (extent(a, period) <= shift && shift + extent(b, period) <= period) return true;
  }
  return false;
}

}  // namespace

void Call::refuse_value(std::initializer_list<Named> shown, const char* format, ...) const {
  va_list values;
  va_start(values, format);
  std::string text = message(function, shown, format, values);
  va_end(values);
  throw Error(STROBE_INVALID_VALUE, text);
}

void Call::refuse_type(std::initializer_list<Named> shown, const char* format, ...) const {
  va_list values;
  va_start(values, format);
  std::string text = message(function, shown, format, values);
  va_end(values);
  throw Error(STROBE_INVALID_TYPE, text);
}

void Call::refuse_unsupported(std::initializer_list<Named> shown, const char* format, ...) const {
  va_list values;
  va_start(values, format);
  std::string text = message(function, shown, format, values);
  va_end(values);
  throw Error(STROBE_UNSUPPORTED, text);
}

bool is_float(int32_t dtype) { return dtype >= STROBE_FLOAT32 && dtype <= STROBE_BFLOAT16; }

int64_t element_size(int32_t dtype) {
  switch (dtype) {
    case STROBE_FLOAT16:
    case STROBE_BFLOAT16:
      return 2;
    case STROBE_INT64:
      return 8;
    default:
      return 4;
  }
}

const char* dtype_name(int32_t dtype) {
  switch (dtype) {
    case STROBE_FLOAT32:
      return "f32";
    case STROBE_FLOAT16:
      return "f16";
    case STROBE_BFLOAT16:
      return "bf16";
    case STROBE_INT32:
      return "int32";
    case STROBE_INT64:
      return "int64";
    default:
      return "of another dtype";
  }
}

bool has_shape(const strobe_tensor& tensor, Shape shape) {
  if (tensor.ndim != static_cast<int>(shape.size())) return false;
  const int64_t* given = tensor.shape;
  for (int64_t size : shape) {
    if (*given++ != size) return false;
  }
  return true;
}

void check_device(const Call& call, Named tensor, Named reference) {
  if (tensor.tensor == reference.tensor) {
    if (tensor->device == STROBE_CPU || tensor->device == STROBE_CUDA) [[likely]]
      return;
    call.refuse_type({tensor}, "%s is on %s, allowed is cpu or cuda", tensor.name, device_text(*tensor.tensor).c_str());
  }
  if (tensor->device == reference->device &&
      (tensor->device == STROBE_CPU || tensor->device_index == reference->device_index)) [[likely]]
    return;
  call.refuse_type({tensor, reference}, "%s is on %s but %s is on %s, allowed is one device for all tensors",
                   tensor.name, device_text(*tensor.tensor).c_str(), reference.name,
                   device_text(*reference.tensor).c_str());
}

void check_rank(const Call& call, Named tensor, int rank, const char* dims) {
  if (tensor->ndim != rank) [[unlikely]] {
    call.refuse_value({tensor}, "%s has %d dimensions, allowed is %d: %s", tensor.name, tensor->ndim, rank, dims);
  }
}

void check_dtype(const Call& call, Named tensor, int32_t dtype, const char* why) {
  if (tensor->dtype != dtype) [[unlikely]] {
    call.refuse_type({tensor}, "%s is %s, allowed is %s%s", tensor.name, dtype_name(tensor->dtype), dtype_name(dtype),
                     why);
  }
}

void check_memory(const Call& call, Named tensor) {
  const strobe_tensor& t = *tensor.tensor;
  bool empty = false;
  for (int i = 0; i < t.ndim; ++i) {
    if (t.shape[i] < 0 || t.shape[i] > kMaxSize) [[unlikely]] {
      call.refuse_value({tensor}, "size %lld of dimension %d of %s, allowed is 0 to 2^40",
                        static_cast<long long>(t.shape[i]), i, tensor.name);
    }
    empty |= t.shape[i] == 0;
  }
  if (empty) return;
  int64_t room = kMaxExtent;
  for (int i = 0; i < t.ndim; ++i) {
    if (t.shape[i] == 1) continue;
    if (t.stride[i] < 0 || t.stride[i] > room / t.shape[i]) [[unlikely]] {
      call.refuse_value({tensor}, "stride %lld of dimension %d of %s, allowed is at least 0 and no overflow",
                        static_cast<long long>(t.stride[i]), i, tensor.name);
    }
    room -= t.stride[i] * t.shape[i];
  }
  const int last = t.ndim - 1;
  if (last >= 0 && t.shape[last] != 1 && t.stride[last] != 1) [[unlikely]] {
    call.refuse_value({tensor}, "the last dimension of %s has stride %lld, allowed is 1", tensor.name,
                      static_cast<long long>(t.stride[last]));
  }
  if (!t.data) [[unlikely]] {
    call.refuse_value({tensor}, "%s has elements but its data is null, allowed is null only without elements",
                      tensor.name);
  }
  if (reinterpret_cast<uintptr_t>(t.data) % element_size(t.dtype) != 0) [[unlikely]] {
    call.refuse_value({tensor}, "the data of %s is not aligned, allowed is a multiple of %lld bytes", tensor.name,
                      static_cast<long long>(element_size(t.dtype)));
  }
}

void check_tensor(const Call& call, Named tensor, Named reference, int32_t dtype, Shape shape, const char* dims) {
  check_device(call, tensor, reference);
  check_dtype(call, tensor, dtype, "");
  check_rank(call, tensor, static_cast<int>(shape.size()), dims);
  if (!has_shape(*tensor.tensor, shape)) [[unlikely]] {
    strobe_tensor wanted{};
    wanted.ndim = static_cast<int>(shape.size());
    int i = 0;
    for (int64_t size : shape) wanted.shape[i++] = size;
    call.refuse_value({tensor, reference}, "%s has shape %s, allowed is %s = %s", tensor.name,
                      shape_text(*tensor.tensor).c_str(), dims, shape_text(wanted).c_str());
  }
  check_memory(call, tensor);
}

void check_index(const Call& call, Named tensor, Named reference, Shape shape, const char* dims) {
  check_tensor(call, tensor, reference, STROBE_INT32, shape, dims);
}

void check_vectors(const Call& call, Named tensor) {
  const strobe_tensor& t = *tensor.tensor;
  if (t.device != STROBE_CUDA || is_empty(t)) return;
  constexpr int64_t kBytes = 16;
  if (reinterpret_cast<uintptr_t>(t.data) % kBytes != 0) [[unlikely]] {
    call.refuse_unsupported({tensor}, "the data of %s is not aligned, allowed on a GPU is a multiple of %lld bytes",
                            tensor.name, static_cast<long long>(kBytes));
  }
  for (int i = 0; i + 1 < t.ndim; ++i) {
    if (t.shape[i] > 1 && t.stride[i] * element_size(t.dtype) % kBytes != 0) [[unlikely]] {
      call.refuse_unsupported({tensor},
                              "stride %lld of dimension %d of %s, allowed on a GPU is a multiple of %lld bytes",
                              static_cast<long long>(t.stride[i]), i, tensor.name, static_cast<long long>(kBytes));
    }
  }
}

void check_writable(const Call& call, Named tensor) {
  const strobe_tensor& t = *tensor.tensor;
  if (is_empty(t)) return;
  // Dims by increasing stride: each must step over everything that the smaller ones reach.
  int64_t size[STROBE_MAX_NDIM], stride[STROBE_MAX_NDIM];
  int n = 0;
  for (int i = 0; i < t.ndim; ++i) {
    if (t.shape[i] == 1) continue;
    int at = n++;
    for (; at > 0 && stride[at - 1] > t.stride[i]; --at) {
      stride[at] = stride[at - 1];
      size[at] = size[at - 1];
    }
    stride[at] = t.stride[i];
    size[at] = t.shape[i];
  }
  int64_t reach = 1;
  for (int i = 0; i < n; ++i) {
    if (stride[i] < reach) [[unlikely]] {
      call.refuse_value({tensor}, "%s is written but elements of it share memory (stride %lld), allowed is no overlap",
                        tensor.name, static_cast<long long>(stride[i]));
    }
    reach += (size[i] - 1) * stride[i];
  }
}

void check_disjoint(const Call& call, Named written, Named other) {
  if (!written || !other || !written->data || !other->data) return;
  const char* a = static_cast<const char*>(written->data);
  const char* b = static_cast<const char*>(other->data);
  if (a + extent(*written.tensor) * element_size(written->dtype) <= b) return;
  if (b + extent(*other.tensor) * element_size(other->dtype) <= a) return;
  if (is_empty(*written.tensor) || is_empty(*other.tensor)) return;
  if (interleaved(*written.tensor, *other.tensor) || interleaved(*other.tensor, *written.tensor)) return;
  call.refuse_value({written, other}, "%s overlaps %s in memory, allowed is no overlap", written.name, other.name);
}

}  // namespace strobe::host
