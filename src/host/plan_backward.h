// The backward pass as launches: delta (and few kept tokens), the main kernel, dQ's conversion, and sums of dK and dV
// where several blocks share a head of keys.
#pragma once

#include "core/launch_bwd.h"
#include "host/plan.h"
#include "host/tune_bwd.h"

namespace strobe::host {

inline constexpr KernelTemplate kBwdPre =
    kernel_template<BwdPreConfig>("cuda/bwd_pre.cuh", "strobe::bwd_pre", "strobe::BwdPreConfig");
inline constexpr KernelTemplate kBwdKeptPre =
    kernel_template<BwdKeptConfig>("cuda/bwd_kept.cuh", "strobe::bwd_kept", "strobe::BwdKeptConfig");
inline constexpr KernelTemplate kBwdKeptSum =
    kernel_template<BwdSumConfig>("cuda/bwd_kept.cuh", "strobe::bwd_kept_sum", "strobe::BwdSumConfig");
inline constexpr KernelTemplate kBwdSm80 =
    kernel_template<BwdConfig>("cuda/bwd_sm80.cuh", "strobe::bwd_sm80", "strobe::BwdConfig");
inline constexpr KernelTemplate kBwdPost =
    kernel_template<BwdPostConfig>("cuda/bwd_post.cuh", "strobe::bwd_post", "strobe::BwdPostConfig");
inline constexpr KernelTemplate kBwdSum =
    kernel_template<BwdSumConfig>("cuda/bwd_post.cuh", "strobe::bwd_sum", "strobe::BwdSumConfig");

// Throws Error where no Config fits.
Plan plan_backward(const BackwardParams& params, const DeviceInfo& device);
// The same with a tile of the caller's choice.
Plan plan_backward(const BackwardParams& params, const DeviceInfo& device, const BwdTile& tile);

void fill_backward(const BackwardParams& params, const Plan& plan, void* workspace, LaunchParams& blocks);

}  // namespace strobe::host
