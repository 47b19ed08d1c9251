// Plans of the forward pass on engine sm90: wgmma and tensor copies, for H100 and H200.
#pragma once

#include "core/config_sm90.h"
#include "core/launch_sm90.h"
#include "host/plan.h"
#include "host/tune_sm90.h"

namespace strobe::host {

inline constexpr KernelTemplate kFwdSm90 =
    kernel_template<FwdSm90Config>("cuda/fwd_sm90.cuh", "strobe::fwd_sm90", "strobe::FwdSm90Config");

// Why this engine cannot serve a call, in words that follow "because"; null where it can.
const char* refusal_sm90(const AttnParams& p, const DeviceInfo& device);
// Where both engines can serve a call: whether this one is the faster.
bool prefers_sm90(const AttnParams& p, const DeviceInfo& device);

// `tile`: instead of the table's choice, for tuning and tests. Adds attention behind what a plan already holds.
void add_forward_sm90(Plan& plan, const AttnParams& p, const DeviceInfo& device, const FwdSm90Tune* tile = nullptr);
Plan plan_forward_sm90(const AttnParams& p, const DeviceInfo& device, const FwdSm90Tune* tile = nullptr);
void fill_forward_sm90(const AttnParams& p, const Plan& plan, void* workspace, LaunchParams& params);

}  // namespace strobe::host
