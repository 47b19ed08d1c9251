// PyTorch's own threads as an executor, so that its thread count is honoured and no second pool competes in the
// process.
#pragma once

#include "strobe/strobe.h"

namespace strobe::python {

// Null where this process has no libtorch_cpu with the calls: Strobe's own threads then serve.
const strobe_executor* torch_executor();

}  // namespace strobe::python
