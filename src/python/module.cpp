// The extension strobe._C: reads torch tensors through the DLPack exchange API and calls the engine. Needs no libtorch.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <array>
#include <cmath>
#include <new>

#include "cpu/cpu.h"
#include "cpu/probabilities.h"
#include "host/executor.h"
#include "host/problem.h"
#include "python/dlpack_abi.h"
#include "python/torch_threads.h"

namespace strobe::python {
namespace {

DLPackExchangeAPI* exchange = nullptr;
PyObject* tensor_type = nullptr;

// A Python exception is set.
struct Raised {};

int32_t dtype_of(const DLTensor& t) {
  if (t.dtype.lanes != 1) return STROBE_OTHER;
  if (t.dtype.code == kDLFloat && t.dtype.bits == 32) return STROBE_FLOAT32;
  if (t.dtype.code == kDLFloat && t.dtype.bits == 16) return STROBE_FLOAT16;
  if (t.dtype.code == kDLBfloat && t.dtype.bits == 16) return STROBE_BFLOAT16;
  if (t.dtype.code == kDLInt && t.dtype.bits == 32) return STROBE_INT32;
  if (t.dtype.code == kDLInt && t.dtype.bits == 64) return STROBE_INT64;
  return STROBE_OTHER;
}

// None gives null. Shapes are copied: DLPack only lends them.
const strobe_tensor* read_tensor(PyObject* object, const char* function, const char* name, strobe_tensor& out) {
  if (object == Py_None) return nullptr;
  if (PyObject_IsInstance(object, tensor_type) != 1) {
    PyErr_Clear();
    PyErr_Format(PyExc_TypeError, "%s: %s is a %S, it takes a torch.Tensor or None", function, name,
                 (PyObject*)Py_TYPE(object));
    throw Raised{};
  }
  DLTensor t;
  if (exchange->dltensor_from_py_object_no_sync(object, &t) != 0) throw Raised{};
  out.data = static_cast<char*>(t.data) + t.byte_offset;
  out.dtype = dtype_of(t);
  out.device = t.device.type == 1 ? STROBE_CPU : t.device.type == 2 ? STROBE_CUDA : STROBE_OTHER_DEVICE;
  out.device_index = t.device.id;
  out.ndim = t.ndim;
  for (int d = 0; d < t.ndim && d < STROBE_MAX_NDIM; ++d) {
    out.shape[d] = t.shape[d];
    out.stride[d] = t.strides[d];
  }
  return &out;
}

struct NamedTensor {
  const char* name;
  const strobe_tensor* strobe_args::* field;
};
constexpr NamedTensor kTensors[] = {
    {"q", &strobe_args::q},
    {"k", &strobe_args::k},
    {"v", &strobe_args::v},
    {"out", &strobe_args::out},
    {"lse", &strobe_args::lse},
    {"cu_seqlens_q", &strobe_args::cu_seqlens_q},
    {"cu_seqlens_k", &strobe_args::cu_seqlens_k},
    {"seqused_q", &strobe_args::seqused_q},
    {"seqused_k", &strobe_args::seqused_k},
    {"leftpad_k", &strobe_args::leftpad_k},
    {"page_table", &strobe_args::page_table},
    {"cache_batch_idx", &strobe_args::cache_batch_idx},
    {"full_from", &strobe_args::full_from},
    {"alibi_slopes", &strobe_args::alibi_slopes},
    {"s_aux", &strobe_args::s_aux},
};
constexpr size_t kTensorCount = std::size(kTensors);

struct Call {
  std::array<strobe_tensor, kTensorCount + 8> storage;
  size_t used = 0;

  const strobe_tensor* read(PyObject* object, const char* function, const char* name) {
    return read_tensor(object, function, name, storage[used++]);
  }

  void read_shared(PyObject* tensors, PyObject* options, strobe_args& args) {
    long long max_q, max_k, left, right, keep;
    unsigned long long seed, offset;
    PyObject* scale;
    int causal, force, deterministic;
    if (!PyArg_ParseTuple(options, "sLLOddKKpLLLppz", &args.function, &max_q, &max_k, &scale, &args.softcap,
                          &args.dropout_p, &seed, &offset, &causal, &left, &right, &keep, &force, &deterministic,
                          &args.backend))
      throw Raised{};
    args.max_seqlen_q = max_q;
    args.max_seqlen_k = max_k;
    args.has_softmax_scale = scale != Py_None;
    if (args.has_softmax_scale) args.softmax_scale = PyFloat_AsDouble(scale);
    if (PyErr_Occurred()) throw Raised{};
    args.seed = seed;
    args.offset = offset;
    args.causal = causal;
    args.window_left = left;
    args.window_right = right;
    args.keep_first = keep;
    args.force_fa_decode = force;
    args.deterministic = deterministic;
    for (size_t n = 0; n < kTensorCount; ++n)
      args.*kTensors[n].field = read(PyTuple_GetItem(tensors, Py_ssize_t(n)), args.function, kTensors[n].name);
  }
};

const strobe_executor& executor() {
  const strobe_executor* torch = torch_executor();
  return torch ? *torch : default_executor();
}

PyObject* shape_tuple(const int64_t* shape, int ndim) {
  PyObject* tuple = PyTuple_New(ndim);
  for (int d = 0; tuple && d < ndim; ++d) PyTuple_SetItem(tuple, d, PyLong_FromLongLong(shape[d]));
  return tuple;
}

PyObject* shapes_tuple(const OutputShapes& shapes) {
  return Py_BuildValue("(NN)", shape_tuple(shapes.out, shapes.out_ndim), shape_tuple(shapes.lse, shapes.lse_ndim));
}

// Runs `body` and turns what it throws into a Python exception.
template <class F>
PyObject* guarded(F body) {
  try {
    return body();
  } catch (const Raised&) {
  } catch (const Error& error) {
    PyObject* type = error.status == STROBE_INVALID_VALUE  ? PyExc_ValueError
                     : error.status == STROBE_INVALID_TYPE ? PyExc_TypeError
                     : error.status == STROBE_UNSUPPORTED  ? PyExc_NotImplementedError
                                                           : PyExc_RuntimeError;
    PyErr_SetString(type, error.what());
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

template <class F>
void without_gil(F body) {
  PyThreadState* state = PyEval_SaveThread();
  try {
    body();
  } catch (...) {
    PyEval_RestoreThread(state);
    throw;
  }
  PyEval_RestoreThread(state);
}

// forward(tensors, options, run) -> ((out shape), (lse shape)); run false: only checks, so that outputs can be
// allocated.
PyObject* forward(PyObject*, PyObject* arguments) {
  return guarded([&]() -> PyObject* {
    PyObject *tensors, *options;
    int run;
    if (!PyArg_ParseTuple(arguments, "O!O!p", &PyTuple_Type, &tensors, &PyTuple_Type, &options, &run)) return nullptr;
    Call call;
    strobe_args args;
    strobe_args_init(&args);
    call.read_shared(tensors, options, args);
    ForwardProblem problem;
    check_forward(args, problem);
    if (run) without_gil([&] { cpu::forward(problem.params, executor()); });
    return shapes_tuple(problem.shapes);
  });
}

// probabilities(tensors, options, s_dmask): tensors with the forward pass's out and lse.
PyObject* probabilities(PyObject*, PyObject* arguments) {
  return guarded([&]() -> PyObject* {
    PyObject *tensors, *options, *s_dmask;
    if (!PyArg_ParseTuple(arguments, "O!O!O", &PyTuple_Type, &tensors, &PyTuple_Type, &options, &s_dmask))
      return nullptr;
    Call call;
    strobe_args args;
    strobe_args_init(&args);
    call.read_shared(tensors, options, args);
    const strobe_tensor& matrix = *call.read(s_dmask, args.function, "s_dmask");
    ForwardProblem problem;
    check_forward(args, problem);
    without_gil([&] { cpu::probabilities(problem.params, matrix.data, matrix.shape[2], matrix.shape[3]); });
    Py_RETURN_NONE;
  });
}

// backward(tensors, options, (dout, dlse, dq, dk, dv, ds_aux))
PyObject* backward(PyObject*, PyObject* arguments) {
  return guarded([&]() -> PyObject* {
    PyObject *tensors, *options, *gradients;
    if (!PyArg_ParseTuple(arguments, "O!O!O!", &PyTuple_Type, &tensors, &PyTuple_Type, &options, &PyTuple_Type,
                          &gradients))
      return nullptr;
    Call call;
    strobe_backward_args args;
    strobe_backward_args_init(&args);
    call.read_shared(tensors, options, args.fwd);
    const auto read = [&](int n, const char* name) {
      return call.read(PyTuple_GetItem(gradients, n), args.fwd.function, name);
    };
    args.dout = read(0, "dout");
    args.dlse = read(1, "dlse");
    args.dq = read(2, "dq");
    args.dk = read(3, "dk");
    args.dv = read(4, "dv");
    args.ds_aux = read(5, "ds_aux");
    BackwardProblem problem;
    check_backward(args, problem);
    without_gil([&] { cpu::backward(problem.params, executor()); });
    Py_RETURN_NONE;
  });
}

// kvcache(tensors, options, (k_new, v_new, rotary_cos, rotary_sin), rotary_interleaved, run) -> shapes, as forward
PyObject* kvcache(PyObject*, PyObject* arguments) {
  return guarded([&]() -> PyObject* {
    PyObject *tensors, *options, *extra;
    int interleaved, run;
    if (!PyArg_ParseTuple(arguments, "O!O!O!pp", &PyTuple_Type, &tensors, &PyTuple_Type, &options, &PyTuple_Type,
                          &extra, &interleaved, &run))
      return nullptr;
    Call call;
    strobe_kvcache_args args;
    strobe_kvcache_args_init(&args);
    call.read_shared(tensors, options, args.fwd);
    const auto read = [&](int n, const char* name) {
      return call.read(PyTuple_GetItem(extra, n), args.fwd.function, name);
    };
    args.k_new = read(0, "k_new");
    args.v_new = read(1, "v_new");
    args.rotary_cos = read(2, "rotary_cos");
    args.rotary_sin = read(3, "rotary_sin");
    args.rotary_interleaved = interleaved;
    KVCacheProblem problem;
    check_kvcache(args, problem);
    if (run) without_gil([&] { cpu::kvcache(problem.params, executor()); });
    return shapes_tuple(problem.shapes);
  });
}

// bind(torch.Tensor): takes its DLPack exchange API.
PyObject* bind(PyObject*, PyObject* type) {
  PyObject* capsule = PyObject_GetAttrString(type, "__dlpack_c_exchange_api__");
  if (!capsule) return nullptr;
  auto* api = static_cast<DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  while (api && api->version.major != 1) api = api->previous;
  Py_DecRef(capsule);
  if (!api) {
    PyErr_SetString(PyExc_ImportError,
                    "strobe: this torch offers no DLPack 1 exchange API; strobe needs torch 2.10 or later");
    return nullptr;
  }
  exchange = api;
  Py_IncRef(type);
  tensor_type = type;
  Py_RETURN_NONE;
}

PyObject* cpu_isa(PyObject*, PyObject*) { return PyUnicode_FromString(cpu::isa_name()); }

PyMethodDef methods[] = {
    {"forward", forward, METH_VARARGS, nullptr},
    {"backward", backward, METH_VARARGS, nullptr},
    {"kvcache", kvcache, METH_VARARGS, nullptr},
    {"probabilities", probabilities, METH_VARARGS, nullptr},
    {"bind", bind, METH_O, nullptr},
    {"cpu_isa", cpu_isa, METH_NOARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "strobe._C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace
}  // namespace strobe::python

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&strobe::python::module); }
