#include "python/arguments.h"

#include <cstdlib>
#include <string>

#include "python/torch_api.h"

namespace strobe::python {
namespace {

struct NamedTensor {
  const char* name;
  const strobe_tensor* strobe_args::* field;
};
constexpr NamedTensor kNames[kTensors] = {
    {"q", &strobe_args::q},
    {"k", &strobe_args::k},
    {"v", &strobe_args::v},
    {"s_aux", &strobe_args::s_aux},
    {"out", &strobe_args::out},
    {"cu_seqlens_q", &strobe_args::cu_seqlens_q},
    {"cu_seqlens_k", &strobe_args::cu_seqlens_k},
    {"seqused_q", &strobe_args::seqused_q},
    {"seqused_k", &strobe_args::seqused_k},
    {"leftpad_k", &strobe_args::leftpad_k},
    {"page_table", &strobe_args::page_table},
    {"cache_batch_idx", &strobe_args::cache_batch_idx},
    {"full_from", &strobe_args::full_from},
    {"alibi_slopes", &strobe_args::alibi_slopes},
};

template <class T>
bool as_int(PyObject* object, T& out) {
  if (!PyLong_CheckExact(object)) return false;
  int overflow = 0;
  out = PyLong_AsLongLongAndOverflow(object, &overflow);
  return !overflow;
}

bool as_double(PyObject* object, double& out) {
  if (!PyFloat_CheckExact(object) && !PyLong_CheckExact(object)) return false;
  out = PyFloat_AsDouble(object);
  if (!PyErr_Occurred()) return true;
  PyErr_Clear();
  return false;
}

bool as_bool(PyObject* object, int32_t& out) {
  out = object == Py_True;
  return out || object == Py_False;
}

bool as_window(PyObject* object, strobe_args& args) {
  if (object == Py_None) return true;
  if (PyTuple_CheckExact(object) && PyTuple_Size(object) == 2)
    return as_int(PyTuple_GetItem(object, 0), args.window_left) &&
           as_int(PyTuple_GetItem(object, 1), args.window_right);
  if (PyList_CheckExact(object) && PyList_Size(object) == 2)
    return as_int(PyList_GetItem(object, 0), args.window_left) && as_int(PyList_GetItem(object, 1), args.window_right);
  return false;
}

// STROBE_BACKEND as it is at the first call: looking through the environment costs a tenth of a small call's check.
const char* default_backend() {
  static const char* const kGiven = std::getenv("STROBE_BACKEND");
  static const std::string kKept = kGiven ? kGiven : "";
  return kGiven ? kKept.c_str() : nullptr;
}

bool as_text(PyObject* object, const char*& out) {
  if (object == Py_None) return true;
  if (!PyUnicode_Check(object)) return false;
  out = PyUnicode_AsUTF8AndSize(object, nullptr);
  if (!out) throw Raised{};
  return true;
}

}  // namespace

const strobe_tensor* Call::read(PyObject* tensor, const char* name) {
  if (tensor == Py_None) return nullptr;
  strobe_tensor& out = storage[used++];
  if (!is_tensor(tensor)) {
    PyErr_Clear();
    PyErr_Format(PyExc_TypeError, "%s: %s is a %S, it takes a torch.Tensor or None", args.function, name,
                 reinterpret_cast<PyObject*>(Py_TYPE(tensor)));
    throw Raised{};
  }
  if (!try_read_tensor(tensor, out)) {
    PyErr_Format(PyExc_TypeError, "%s: %s is a tensor without memory of its own (%S), it takes a dense tensor",
                 args.function, name, reinterpret_cast<PyObject*>(Py_TYPE(tensor)));
    throw Raised{};
  }
  return &out;
}

bool read_options(PyObject* const* options, strobe_args& args) {
  const auto at = [&](Slot slot) { return options[slot - kTensors]; };
  args.has_softmax_scale = at(kSoftmaxScale) != Py_None;
  const char* backend = nullptr;
  const bool usual = as_text(at(kFunction), args.function) && as_int(at(kMaxSeqlenQ), args.max_seqlen_q) &&
                     as_int(at(kMaxSeqlenK), args.max_seqlen_k) &&
                     (!args.has_softmax_scale || as_double(at(kSoftmaxScale), args.softmax_scale)) &&
                     as_double(at(kSoftcap), args.softcap) && as_double(at(kDropoutP), args.dropout_p) &&
                     as_bool(at(kCausal), args.causal) && as_window(at(kWindowSize), args) &&
                     as_int(at(kKeepFirst), args.keep_first) && as_bool(at(kForceFaDecode), args.force_fa_decode) &&
                     as_bool(at(kDeterministic), args.deterministic) && as_text(at(kBackend), backend) &&
                     as_int(at(kSeed), args.seed) && as_int(at(kOffset), args.offset);
  args.backend = backend ? backend : default_backend();
  return usual;
}

void read_tensors(PyObject* const* tensors, Call& call) {
  for (int n = 0; n < kTensors; ++n) call.args.*kNames[n].field = call.read(tensors[n], kNames[n].name);
}

bool read_plain_tensors(PyObject* const* tensors, Call& call) {
  for (int n = 0; n < kTensors; ++n) {
    if (tensors[n] == Py_None) continue;
    strobe_tensor& t = call.storage[call.used++];
    if (!is_plain_tensor(tensors[n]) || !try_read_tensor(tensors[n], t)) return false;
    if (n <= kV) {
      const int last = t.ndim - 1;
      if (last < 0 || last >= STROBE_MAX_NDIM || (t.stride[last] != 1 && t.shape[last] != 1)) return false;
      // A negated view is one of complex numbers, whose stride is even.
      if (t.shape[last] == 1 && is_negated(tensors[n])) return false;
    }
    // A GPU reads sinks in float32: Python converts them.
    if (n == kSAux && t.device == STROBE_CUDA && t.dtype != STROBE_FLOAT32) return false;
    call.args.*kNames[n].field = &t;
  }
  return true;
}

}  // namespace strobe::python
