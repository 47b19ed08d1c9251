// Plans of the forward pass on engine sm80.
#pragma once

#include "core/config.h"
#include "core/launch.h"
#include "host/plan.h"

namespace strobe::host {

inline constexpr KernelTemplate kFwdSm80 =
    kernel_template<FwdConfig>("cuda/fwd_sm80.cuh", "strobe::fwd_sm80", "strobe::FwdConfig");

// Whether a Config exists for these head dims.
bool forward_fits(const AttnParams& p, const DeviceInfo& device);

// Kernels move 16 bytes at a time: data and the strides of batch entries, rows and heads must be multiples of that.
bool forward_aligned(const AttnParams& p);

// Adds attention behind what a plan already holds.
void add_forward(Plan& plan, const AttnParams& p, const DeviceInfo& device);
Plan plan_forward(const AttnParams& p, const DeviceInfo& device);
void fill_forward(const AttnParams& p, const Plan& plan, void* workspace, LaunchParams& params);

}  // namespace strobe::host
