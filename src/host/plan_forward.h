// Plans of the forward passes on engine sm80: attention, and attention with a cache that is appended to first.
#pragma once

#include "core/config.h"
#include "core/launch.h"
#include "host/plan.h"

namespace strobe::host {

inline constexpr KernelTemplate kFwdSm80 =
    kernel_template<FwdConfig>("cuda/fwd_sm80.cuh", "strobe::fwd_sm80", "strobe::FwdConfig");
inline constexpr KernelTemplate kCombine =
    kernel_template<CombineConfig>("cuda/combine.cuh", "strobe::combine", "strobe::CombineConfig");
inline constexpr KernelTemplate kAppendKV =
    kernel_template<AppendConfig>("cuda/append_kv.cuh", "strobe::append_kv", "strobe::AppendConfig");

// Whether a Config exists for these head dims.
bool forward_fits(const AttnParams& p, const DeviceInfo& device);

// Kernels move 16 bytes at a time: data and the strides of batch entries, rows and heads must be multiples of that.
bool forward_aligned(const AttnParams& p);

Plan plan_forward(const AttnParams& p, const DeviceInfo& device);
void fill_forward(const AttnParams& p, const Plan& plan, void* workspace, LaunchParams& params);

Plan plan_kvcache(const KVCacheParams& c, const DeviceInfo& device);
void fill_kvcache(const KVCacheParams& c, const Plan& plan, void* workspace, LaunchParams& params);

}  // namespace strobe::host
