// Compiling ahead of time: what a described call would run, for an architecture that need not be here.
#pragma once

#include <string>

#include "host/plan.h"
#include "strobe/strobe.h"

namespace strobe::host {

// "pass=forward dtype=bf16 head_dim=128 ..." (strobe_compile in strobe.h). Throw Error for words that mean nothing.
Plan plan_of(const std::string& call, const DeviceInfo& device);
// What it runs on a typical device of this architecture, in words.
std::string explain_call(const std::string& call, int arch);
void precompile(const std::string& call, int arch, const std::string& folder, strobe_kernel_visitor visit,
                void* context);

}  // namespace strobe::host
