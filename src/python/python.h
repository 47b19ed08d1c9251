// What every file of the extension needs of CPython: owned references, and C++ exceptions turned into Python's.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <exception>
#include <new>
#include <utility>

#include "host/problem.h"

namespace strobe::python {

// A Python exception is set.
struct Raised {};

// An owned reference; null after a failed call, which get() turns into Raised.
class Ref {
 public:
  Ref() = default;
  explicit Ref(PyObject* object) : object_(object) {}
  Ref(Ref&& other) noexcept : object_(std::exchange(other.object_, nullptr)) {}
  Ref& operator=(Ref&& other) noexcept {
    std::swap(object_, other.object_);
    return *this;
  }
  Ref(const Ref&) = delete;
  ~Ref() { Py_XDECREF(object_); }

  static Ref borrow(PyObject* object) {
    Py_INCREF(object);
    return Ref(object);
  }
  PyObject* get() const {
    if (!object_) throw Raised{};
    return object_;
  }
  PyObject* release() {
    get();
    return std::exchange(object_, nullptr);
  }
  explicit operator bool() const { return object_ != nullptr; }

 private:
  PyObject* object_ = nullptr;
};

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

}  // namespace strobe::python
