// The extension strobe._C. attend, attend_with_cache and record serve plain eager calls and turn anything unusual down
// (NotImplemented); forward, backward, kvcache and probabilities are what strobe/_operators.py builds its operators
// from.
#include "cpu/cpu.h"
#include "python/run.h"
#include "python/torch_api.h"

namespace strobe::python {
namespace {

// autograd.Function.apply of `Recorded` (_autograd.py), whose forward is `record`.
PyObject* apply_recorded = nullptr;
PyObject *to_save = nullptr, *ctx_options = nullptr, *materialize = nullptr;

// The call that attend has read and record runs, both within one apply: reading it twice would cost 0.4 us.
struct Pending {
  Call* call = nullptr;
  PyObject* const* flat = nullptr;
  bool return_lse = false;
};
thread_local Pending pending;

void expect_arguments(const char* name, Py_ssize_t given, Py_ssize_t allowed) {
  if (given == allowed) return;
  PyErr_Format(PyExc_TypeError, "strobe._C.%s takes %zd arguments, %zd were given", name, allowed, given);
  throw Raised{};
}

// A tuple's items, borrowed.
template <int kCount>
std::array<PyObject*, kCount> items_of(PyObject* tuple, const char* name) {
  if (!PyTuple_Check(tuple)) {
    PyErr_Format(PyExc_TypeError, "strobe._C.%s takes a tuple", name);
    throw Raised{};
  }
  expect_arguments(name, PyTuple_Size(tuple), kCount);
  std::array<PyObject*, kCount> items;
  for (int n = 0; n < kCount; ++n) items[n] = PyTuple_GetItem(tuple, n);
  return items;
}

void read_all(PyObject* const* flat, const char* name, Call& call) {
  if (!read_options(flat + kTensors, call.args)) {
    PyErr_Format(PyExc_TypeError, "strobe._C.%s: an option is not of the type that it takes", name);
    throw Raised{};
  }
  read_tensors(flat, call);
}

PyObject* or_none(Ref& object) { return object ? object.release() : Py_NewRef(Py_None); }

PyObject* new_or_given(Ref& fresh, PyObject* given) { return fresh ? fresh.release() : Py_NewRef(given); }

PyObject* pair(Outputs& outputs, PyObject* given_out) {
  Ref result(PyTuple_New(2));
  PyTuple_SetItem(result.get(), 0, new_or_given(outputs.out, given_out));
  PyTuple_SetItem(result.get(), 1, or_none(outputs.lse));
  return result.release();
}

bool wants_gradient(PyObject* const* flat) {
  return is_grad_enabled() &&
         (requires_grad(flat[kQ]) || requires_grad(flat[kK]) || requires_grad(flat[kV]) || requires_grad(flat[kSAux]));
}

// True where a plain eager call may read its tensors and take its values as they are.
bool is_usual(PyObject* const* flat, Call& call) {
  if (is_unusual_state() || !read_options(flat + kTensors, call.args) || !read_plain_tensors(flat, call)) return false;
  const strobe_args& args = call.args;
  if (!args.q || !args.k || !args.v) return false;
  const bool fp32 =
      args.q->dtype == STROBE_FLOAT32 || args.k->dtype == STROBE_FLOAT32 || args.v->dtype == STROBE_FLOAT32;
  return args.dropout_p == 0 && !(fp32 && is_autocast_enabled());
}

// attend(*flat, return_lse) -> out, (out, lse), or NotImplemented
PyObject* attend(PyObject*, PyObject* const* flat, Py_ssize_t count) {
  return guarded([&]() -> PyObject* {
    expect_arguments("attend", count, kSlots + 1);
    Call call;
    if (!is_usual(flat, call)) return Py_NewRef(Py_NotImplemented);
    const bool return_lse = flat[kSlots] == Py_True;
    if (!wants_gradient(flat)) {
      Outputs outputs = run_forward(call, return_lse);
      return return_lse ? pair(outputs, flat[kOut]) : new_or_given(outputs.out, flat[kOut]);
    }
    if (call.args.out) return Py_NewRef(Py_NotImplemented);
    pending = {&call, flat, return_lse};
    Ref result(PyObject_CallFunctionObjArgs(apply_recorded, flat[kQ], flat[kK], flat[kV], flat[kSAux], nullptr));
    pending = {};
    return result.release();
  });
}

// record(ctx, q, k, v, s_aux) -> out or (out, lse): forward of an autograd.Function, within attend. ctx keeps the
// options; tensors are saved, so that what frees, moves or checks saved tensors reaches all of them.
PyObject* record(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  return guarded([&]() -> PyObject* {
    expect_arguments("record", count, 5);
    const Pending now = std::exchange(pending, {});
    if (!now.call) throw Error(STROBE_INTERNAL, "strobe._C.record: called outside of attend");
    PyObject* ctx = arguments[0];
    Outputs outputs = run_forward(*now.call, true);
    const Ref options(PyTuple_New(kOptions));
    for (int n = 0; n < kOptions; ++n) PyTuple_SetItem(options.get(), n, Py_NewRef(now.flat[kTensors + n]));
    // Each saved value costs torch time, None too. Most calls have nothing beside q, k, v and s_aux.
    bool has_side = false;
    for (int n = kCuSeqlensQ; n < kTensors; ++n) has_side |= now.flat[n] != Py_None;
    const int count = has_side ? kTensors + 1 : kOut + 2;
    const Ref saved(PyTuple_New(count));
    for (int n = 0; n < count; ++n) {
      PyObject* object = n == kOut       ? outputs.lse.get()
                         : n == kOut + 1 ? outputs.out.get()
                                         : now.flat[n < kOut ? n : n - 1];
      PyTuple_SetItem(saved.get(), n, Py_NewRef(object));
    }
    if (PyObject_SetAttr(ctx, to_save, saved.get()) || PyObject_SetAttr(ctx, ctx_options, options.get()))
      throw Raised{};
    if (!now.return_lse) return outputs.out.release();
    const Ref done(PyObject_CallMethodObjArgs(ctx, materialize, Py_False, nullptr));
    done.get();
    return pair(outputs, Py_None);
  });
}

// forward(flat) -> (out, lse)
PyObject* forward(PyObject*, PyObject* tuple) {
  return guarded([&]() -> PyObject* {
    const auto flat = items_of<kSlots>(tuple, "forward");
    Call call;
    read_all(flat.data(), "forward", call);
    Outputs outputs = run_forward(call, true);
    return pair(outputs, flat[kOut]);
  });
}

// backward((*tensors, lse), options, dout, dlse) -> (dq, dk, dv, ds_aux)
PyObject* backward(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  return guarded([&]() -> PyObject* {
    expect_arguments("backward", count, 4);
    const auto tensors = items_of<kTensors + 1>(arguments[0], "backward");
    const auto options = items_of<kOptions>(arguments[1], "backward");
    std::array<PyObject*, kSlots> flat;
    for (int n = 0; n < kSlots; ++n) flat[n] = n < kTensors ? tensors[n] : options[n - kTensors];
    Call call;
    read_all(flat.data(), "backward", call);
    call.args.lse = call.read(tensors[kTensors], "lse");
    Gradients gradients = run_backward(call, arguments[2], arguments[3]);
    Ref result(PyTuple_New(4));
    PyTuple_SetItem(result.get(), 0, gradients.dq.release());
    PyTuple_SetItem(result.get(), 1, gradients.dk.release());
    PyTuple_SetItem(result.get(), 2, gradients.dv.release());
    PyTuple_SetItem(result.get(), 3, or_none(gradients.ds_aux));
    return result.release();
  });
}

constexpr int kCacheSlots = kSlots + 5;  // then k, v, rotary_cos, rotary_sin, rotary_interleaved

// attend_with_cache(*flat, k, v, rotary_cos, rotary_sin, rotary_interleaved, return_lse) -> as attend
PyObject* attend_with_cache(PyObject*, PyObject* const* flat, Py_ssize_t count) {
  return guarded([&]() -> PyObject* {
    expect_arguments("attend_with_cache", count, kCacheSlots + 1);
    Call call;
    PyObject* const* extra = flat + kSlots;
    if (!is_usual(flat, call) || !PyBool_Check(extra[4])) return Py_NewRef(Py_NotImplemented);
    for (int n = 0; n < 4; ++n) {
      if (extra[n] == Py_None) continue;
      strobe_tensor t;
      if (!is_plain_tensor(extra[n]) || !try_read_tensor(extra[n], t) || t.ndim < 1 || t.ndim > STROBE_MAX_NDIM ||
          (t.stride[t.ndim - 1] != 1 && t.shape[t.ndim - 1] != 1) || is_negated(extra[n]))
        return Py_NewRef(Py_NotImplemented);
    }
    if (wants_gradient(flat) || (is_grad_enabled() && (requires_grad(extra[0]) || requires_grad(extra[1]))))
      return Py_NewRef(Py_NotImplemented);
    const bool return_lse = flat[kCacheSlots] == Py_True;
    Outputs outputs = run_kvcache(call, extra, extra[4] == Py_True, return_lse);
    return return_lse ? pair(outputs, flat[kOut]) : new_or_given(outputs.out, flat[kOut]);
  });
}

// kvcache(flat, (k, v, rotary_cos, rotary_sin), rotary_interleaved) -> (out, lse)
PyObject* kvcache(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  return guarded([&]() -> PyObject* {
    expect_arguments("kvcache", count, 3);
    const auto flat = items_of<kSlots>(arguments[0], "kvcache");
    const auto extra = items_of<4>(arguments[1], "kvcache");
    Call call;
    read_all(flat.data(), "kvcache", call);
    Outputs outputs = run_kvcache(call, extra.data(), PyObject_IsTrue(arguments[2]) == 1, true);
    return pair(outputs, flat[kOut]);
  });
}

// probabilities((*tensors, lse), options, s_dmask)
PyObject* probabilities(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  return guarded([&]() -> PyObject* {
    expect_arguments("probabilities", count, 3);
    const auto tensors = items_of<kTensors + 1>(arguments[0], "probabilities");
    const auto options = items_of<kOptions>(arguments[1], "probabilities");
    std::array<PyObject*, kSlots> flat;
    for (int n = 0; n < kSlots; ++n) flat[n] = n < kTensors ? tensors[n] : options[n - kTensors];
    Call call;
    read_all(flat.data(), "probabilities", call);
    call.args.lse = call.read(tensors[kTensors], "lse");
    run_probabilities(call, arguments[2]);
    return Py_NewRef(Py_None);
  });
}

PyObject* bind_apply(PyObject*, PyObject* apply) {
  apply_recorded = Py_NewRef(apply);
  to_save = PyUnicode_InternFromString("to_save");
  ctx_options = PyUnicode_InternFromString("options");
  materialize = PyUnicode_InternFromString("set_materialize_grads");
  return Py_NewRef(Py_None);
}

PyObject* cpu_isa(PyObject*, PyObject*) { return PyUnicode_FromString(cpu::isa_name()); }

template <class F>
PyCFunction fast(F function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

PyMethodDef methods[] = {
    {"attend", fast(attend), METH_FASTCALL, nullptr},
    {"attend_with_cache", fast(attend_with_cache), METH_FASTCALL, nullptr},
    {"record", fast(record), METH_FASTCALL, nullptr},
    {"forward", forward, METH_O, nullptr},
    {"backward", fast(backward), METH_FASTCALL, nullptr},
    {"kvcache", fast(kvcache), METH_FASTCALL, nullptr},
    {"probabilities", fast(probabilities), METH_FASTCALL, nullptr},
    {"bind", bind, METH_VARARGS, nullptr},
    {"bind_apply", bind_apply, METH_O, nullptr},
    {"cpu_isa", cpu_isa, METH_NOARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "strobe._C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace
}  // namespace strobe::python

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&strobe::python::module); }
