// Check, allocate what the caller did not give, run the engine.
#pragma once

#include "python/arguments.h"

namespace strobe::python {

struct Outputs {
  Ref out;  // null where the caller gave one
  Ref lse;  // null where it was not wanted
};
Outputs run_forward(Call& call, bool want_lse);

struct Gradients {
  Ref dq, dk, dv, ds_aux;  // ds_aux is float32, null without s_aux
};
// call.args holds the forward call's out and lse too; dlse may be None.
Gradients run_backward(Call& call, PyObject* dout, PyObject* dlse);

// extra: k, v, rotary_cos, rotary_sin.
Outputs run_kvcache(Call& call, PyObject* const* extra, bool rotary_interleaved, bool want_lse);

void run_probabilities(Call& call, PyObject* s_dmask);

}  // namespace strobe::python
