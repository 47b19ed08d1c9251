// The launch before attention: new keys and values go into the cache, and q is turned by rotary position.
#pragma once

#include "core/config.h"
#include "core/launch.h"
#include "host/plan.h"

namespace strobe::host {

inline constexpr KernelTemplate kAppendKV =
    kernel_template<AppendConfig>("cuda/append_kv.cuh", "strobe::append_kv", "strobe::AppendConfig");

// Adds what must run before attention, if anything, and the room that it needs.
void add_append(Plan& plan, const KVCacheParams& c);
// What attention computes on: q as it lies in the workspace once it is turned.
AttnParams attention_of(const KVCacheParams& c, const Plan& plan, void* workspace);
void fill_append(const KVCacheParams& c, const Plan& plan, void* workspace, LaunchParams& params);

}  // namespace strobe::host
