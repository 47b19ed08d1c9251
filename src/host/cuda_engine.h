// The CUDA engine's entry points, on the caller's stream and in the caller's workspace: nothing here allocates device
// memory, synchronises or, once the kernels are loaded, works on strings.
//
//   const host::Device& gpu = host::device(device_index);
//   const host::Plan plan = cuda::plan(params, gpu);            // AttnParams, BackwardParams or KVCacheParams
//   void* workspace = plan.workspace_bytes ? allocate(plan.workspace_bytes) : nullptr;
//   cuda::run(params, plan, gpu, workspace, stream);            // a CUstream; null is the default stream
//
// A workspace starts at a multiple of 256 bytes, as device allocations do, and must outlive the kernels on the stream.
#pragma once

#include <string>

#include "host/device.h"
#include "host/plan.h"
#include "host/problem.h"

namespace strobe::cuda {

// Throw Error. Pure but for reading the device's facts.
host::Plan plan(const AttnParams& params, const host::Device& device);
host::Plan plan(const AttnParams& params, const host::DeviceInfo& device);
host::Plan plan(const BackwardParams& params, const host::Device& device);
host::Plan plan(const KVCacheParams& params, const host::Device& device);
host::Plan plan(const KVCacheParams& params, const host::DeviceInfo& device);

// Compile and load what is cold, then launch. Throw Error, also for a cold kernel on a stream that is being captured.
void run(const AttnParams& params, const host::Plan& plan, const host::Device& device, void* workspace, void* stream);
void run(const BackwardParams& params, const host::Plan& plan, const host::Device& device, void* workspace,
         void* stream);
void run(const KVCacheParams& params, const host::Plan& plan, const host::Device& device, void* workspace,
         void* stream);

// What a plan runs, for people: the engine and why it was chosen, each kernel's Config and grid, splits and workspace.
std::string explain(const host::Plan& plan);

// Throws Error with the nearest head dims that a kernel fits.
void check_forward_fits(const AttnParams& params, const host::DeviceInfo& device);

// Errors of the calls above do not know the function that the user called: this puts its name before them.
template <class Body>
auto named(const char* function, Body body) {
  try {
    return body();
  } catch (const Error& error) {
    throw Error(error.status, std::string(function) + ": " + error.what());
  }
}

}  // namespace strobe::cuda
