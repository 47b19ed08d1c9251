// Stands in for src/cuda/ptx/memory.cuh.
#pragma once

#include "core/base.h"
#include "device.h"

namespace strobe::ptx {

inline float4 ld_global_16(const float* from, bool there) {
  return there ? float4{from[0], from[1], from[2], from[3]} : float4{0.f, 0.f, 0.f, 0.f};
}

}  // namespace strobe::ptx
