// All that the extension asks of torch: tensors through the DLPack exchange API, new tensors, and what this thread's
// torch is doing. Bound once, from Python (strobe/_extension.py).
#pragma once

#include "python/python.h"

namespace strobe::python {

// bind(torch.Tensor, torch.nn.Parameter, handles): takes the exchange API and the callables that `handles` names.
PyObject* bind(PyObject* module, PyObject* arguments);

// A torch.Tensor or Parameter itself, no subclass.
bool is_plain_tensor(PyObject* object);
bool is_tensor(PyObject* object);

// True where a plain tensor may not be read directly: dispatch modes, functorch, forward-mode AD, jit tracing.
bool is_unusual_state();
bool is_autocast_enabled();
bool is_grad_enabled();
bool requires_grad(PyObject* tensor);
// A negated view, whose memory holds the opposite of its values.
bool is_negated(PyObject* tensor);

// False where the tensor has no memory that may be read: fake, meta, sparse, wrapped. Clears the Python error.
// Shapes are copied: DLPack only lends them.
bool try_read_tensor(PyObject* tensor, strobe_tensor& out);

// A new contiguous tensor on the device of `device`, and its memory. On a GPU that device must be the current one.
// STROBE_OTHER stands for bytes.
struct NewTensor {
  Ref object;
  void* data;
};
NewTensor new_tensor(const strobe_tensor& device, int32_t dtype, const int64_t* shape, int ndim);
// torch's current stream on a GPU, a cudaStream_t.
void* current_stream(int32_t device_index);
// The tensor, or a contiguous copy.
Ref contiguous(PyObject* tensor);

}  // namespace strobe::python
