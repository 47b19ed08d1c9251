#include "python/torch_api.h"

#include <algorithm>

#include "python/dlpack_abi.h"

namespace strobe::python {
namespace {

// Owned for the life of the process.
struct Torch {
  DLPackExchangeAPI* exchange;
  PyObject *tensor, *parameter;
  PyObject *dispatch_modes, *functorch, *tracing, *autocast, *grad, *is_neg, *contiguous, *empty_cpu, *empty_cuda;
  PyObject *float32, *float16, *bfloat16, *uint8;
  PyObject *forward_ad, *current_level, *requires_grad;
} torch;

bool is_true(PyObject* callable) {
  const Ref result(PyObject_CallNoArgs(callable));
  return result.get() == Py_True;
}

int32_t dtype_of(const DLTensor& t) {
  if (t.dtype.lanes != 1) return STROBE_OTHER;
  if (t.dtype.code == kDLFloat && t.dtype.bits == 32) return STROBE_FLOAT32;
  if (t.dtype.code == kDLFloat && t.dtype.bits == 16) return STROBE_FLOAT16;
  if (t.dtype.code == kDLBfloat && t.dtype.bits == 16) return STROBE_BFLOAT16;
  if (t.dtype.code == kDLInt && t.dtype.bits == 32) return STROBE_INT32;
  if (t.dtype.code == kDLInt && t.dtype.bits == 64) return STROBE_INT64;
  return STROBE_OTHER;
}

PyObject* dtype_object(int32_t dtype) {
  return dtype == STROBE_FLOAT16    ? torch.float16
         : dtype == STROBE_BFLOAT16 ? torch.bfloat16
         : dtype == STROBE_FLOAT32  ? torch.float32
                                    : torch.uint8;
}

// The tuples of the last shape: calls repeat their shapes, and making them is a quarter of a small allocation's time.
struct SizeCache {
  int ndim = -1;
  int64_t shape[STROBE_MAX_NDIM];
  Ref sizes, strides;

  bool holds(const int64_t* other, int count) const { return ndim == count && std::equal(other, other + count, shape); }
  void make(const int64_t* other, int count) {
    ndim = -1;  // until both tuples are whole
    sizes = Ref(PyTuple_New(count));
    strides = Ref(PyTuple_New(count));
    int64_t stride = 1;
    for (int d = count; d-- > 0;) {
      PyTuple_SetItem(sizes.get(), d, PyLong_FromLongLong(other[d]));
      PyTuple_SetItem(strides.get(), d, PyLong_FromLongLong(stride));
      stride *= other[d] ? other[d] : 1;
      shape[d] = other[d];
    }
    ndim = count;
  }
};

DLPackExchangeAPI* exchange_api(PyObject* tensor_type) {
  const Ref capsule(PyObject_GetAttrString(tensor_type, "__dlpack_c_exchange_api__"));
  if (!capsule) PyErr_Clear();
  void* pointer = capsule ? PyCapsule_GetPointer(capsule.get(), "dlpack_exchange_api") : nullptr;
  auto* api = static_cast<DLPackExchangeAPI*>(pointer);
  while (api && api->version.major != 1) api = api->previous;
  if (api) return api;
  PyErr_SetString(PyExc_ImportError,
                  "strobe: this torch offers no DLPack 1 exchange API; strobe needs torch 2.10 or later");
  throw Raised{};
}

}  // namespace

PyObject* bind(PyObject*, PyObject* arguments) {
  return guarded([&]() -> PyObject* {
    PyObject *tensor, *parameter, *handles;
    if (!PyArg_ParseTuple(arguments, "OOO!", &tensor, &parameter, &PyDict_Type, &handles)) return nullptr;
    torch.exchange = exchange_api(tensor);
    const auto take = [&](const char* name) {
      PyObject* value = PyDict_GetItemString(handles, name);
      if (!value) {
        PyErr_Format(PyExc_KeyError, "strobe._C.bind: %s", name);
        throw Raised{};
      }
      return Ref::borrow(value).release();
    };
    torch.dispatch_modes = take("dispatch_modes");
    torch.functorch = take("functorch");
    torch.tracing = take("tracing");
    torch.autocast = take("autocast");
    torch.grad = take("grad");
    torch.is_neg = take("is_neg");
    torch.contiguous = take("contiguous");
    torch.empty_cpu = take("empty_cpu");
    torch.empty_cuda = take("empty_cuda");
    torch.float32 = take("float32");
    torch.float16 = take("float16");
    torch.bfloat16 = take("bfloat16");
    torch.uint8 = take("uint8");
    torch.forward_ad = take("forward_ad");
    torch.current_level = Ref(PyUnicode_InternFromString("_current_level")).release();
    torch.requires_grad = Ref(PyUnicode_InternFromString("requires_grad")).release();
    torch.tensor = Ref::borrow(tensor).release();
    torch.parameter = Ref::borrow(parameter).release();
    Py_RETURN_NONE;
  });
}

bool is_plain_tensor(PyObject* object) {
  PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
  return type == torch.tensor || type == torch.parameter;
}

bool is_tensor(PyObject* object) { return PyObject_IsInstance(object, torch.tensor) == 1; }

bool is_unusual_state() {
  const Ref modes(PyObject_CallNoArgs(torch.dispatch_modes));
  if (PyLong_AsLong(modes.get()) != 0) return true;
  if (is_true(torch.functorch)) return true;
  PyObject* level = PyDict_GetItem(torch.forward_ad, torch.current_level);
  if (!level || PyLong_AsLong(level) >= 0) return true;
  return is_true(torch.tracing);
}

bool is_autocast_enabled() { return is_true(torch.autocast); }
bool is_grad_enabled() { return is_true(torch.grad); }

bool requires_grad(PyObject* tensor) {
  if (tensor == Py_None) return false;
  const Ref value(PyObject_GetAttr(tensor, torch.requires_grad));
  return value.get() == Py_True;
}

bool is_negated(PyObject* tensor) {
  const Ref value(PyObject_CallFunctionObjArgs(torch.is_neg, tensor, nullptr));
  return value.get() == Py_True;
}

bool try_read_tensor(PyObject* tensor, strobe_tensor& out) {
  DLTensor t;
  if (torch.exchange->dltensor_from_py_object_no_sync(tensor, &t) != 0) {
    PyErr_Clear();
    return false;
  }
  out.data = static_cast<char*>(t.data) + t.byte_offset;
  out.dtype = dtype_of(t);
  out.device = t.device.type == kDLCPU ? STROBE_CPU : t.device.type == kDLCUDA ? STROBE_CUDA : STROBE_OTHER_DEVICE;
  out.device_index = t.device.id;
  out.ndim = t.ndim;
  int64_t count = 1;
  for (int d = 0; d < t.ndim; ++d) {
    count *= t.shape[d];
    if (d >= STROBE_MAX_NDIM) continue;
    out.shape[d] = t.shape[d];
    out.stride[d] = t.strides[d];
  }
  return t.data || count == 0;
}

NewTensor new_tensor(const strobe_tensor& device, int32_t dtype, const int64_t* shape, int ndim) {
  // Of outputs, LSEs and workspaces. The GIL guards them; they are never freed, since the interpreter ends before
  // statics do.
  static SizeCache* const caches = new SizeCache[3];
  SizeCache& cache = caches[dtype == STROBE_OTHER ? 2 : dtype == STROBE_FLOAT32 && ndim < 4];
  if (!cache.holds(shape, ndim)) cache.make(shape, ndim);
  PyObject* empty = device.device == STROBE_CUDA ? torch.empty_cuda : torch.empty_cpu;
  NewTensor fresh{
      Ref(PyObject_CallFunctionObjArgs(empty, cache.sizes.get(), cache.strides.get(), dtype_object(dtype), nullptr)),
      nullptr};
  DLTensor t;
  if (torch.exchange->dltensor_from_py_object_no_sync(fresh.object.get(), &t) != 0) throw Raised{};
  fresh.data = static_cast<char*>(t.data) + t.byte_offset;
  return fresh;
}

void* current_stream(int32_t device_index) {
  void* stream = nullptr;
  if (torch.exchange->current_work_stream(kDLCUDA, device_index, &stream) != 0) throw Raised{};
  return stream;
}

Ref contiguous(PyObject* tensor) {
  Ref result(PyObject_CallFunctionObjArgs(torch.contiguous, tensor, nullptr));
  result.get();
  return result;
}

}  // namespace strobe::python
