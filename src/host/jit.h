// From a kernel and its Config to machine code: one NVRTC program of the embedded sources.
#pragma once

#include <string>

#include "host/plan.h"

namespace strobe::host {

struct Cubin {
  std::string name;       // of the function in the image
  std::string image;      // what cuModuleLoadData takes
  int nvrtc_version = 0;  // 13000 is CUDA 13.0
};

// What ptxas said about the kernel, and what it cost.
struct CompileReport {
  int registers = 0, stack_bytes = 0, spill_stores = 0, spill_loads = 0;
  double seconds = 0;  // of processor time
  std::string log;
};

// "fwd_sm80{dtype=3, head_dim=128, ...}": the words for people, and part of the cache's key.
std::string describe(const KernelRef& kernel);
// "strobe::fwd_sm80<strobe::FwdConfig{3,128,...}>": the words for NVRTC.
std::string name_expression(const KernelRef& kernel);
// "sm_90a". Kernels of 90 use what only that one has.
std::string target_of(int arch);
// Everything that the machine code depends on but the compiler's version: sources, options, kernel and target.
std::string identity(const KernelRef& kernel, int arch);

// Throws Error with the Config, the compiler's log and the folder where the sources were kept. Needs no GPU.
Cubin compile(const KernelRef& kernel, int arch, CompileReport* report = nullptr);

}  // namespace strobe::host
