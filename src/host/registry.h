// From a kernel to its loaded function: memory, then disk, then the compiler.
#pragma once

#include <string>

#include "host/device.h"
#include "host/jit.h"

namespace strobe::host {

// Loaded on this device, its context current. A kernel that is loaded already costs one lookup by integers: no lock,
// no string, no allocation. `stream` matters for a cold one: while it is being captured, Error says to warm up.
CUfunction function_of(const Launch& launch, const Device& device, CUstream stream);
// Loads what a plan needs; several cold kernels are compiled at the same time.
void load(const Plan& plan, const Device& device, CUstream stream, CUfunction* functions);

// Machine code from memory, disk or the compiler; new code goes to disk. `newest` as for read_cache.
// STROBE_DISABLE_JIT=1 leaves the compiler out.
const Cubin& cubin_of(const KernelRef& kernel, int arch, int newest);

}  // namespace strobe::host
