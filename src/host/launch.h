// Runs a plan's kernels, one after another, on a stream.
#pragma once

#include "host/device.h"

namespace strobe::host {

// The device must be current. `params` holds a block for each launch. Empty grids are left out.
void launch(const Plan& plan, LaunchParams& params, const Device& device, CUstream stream);

}  // namespace strobe::host
