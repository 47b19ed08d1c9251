// A kernel may be started while the one before it in the stream still runs (Launch::overlaps). Before sm_90 there is no
// such thing, and nothing is needed.
#pragma once

#include "core/base.h"

namespace strobe::ptx {

// The next kernel may be started once every block has said so or has ended.
__device__ __forceinline__ void start_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
// Until the kernel before has ended and all that it wrote can be read.
__device__ __forceinline__ void wait_for_prerequisites() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace strobe::ptx
