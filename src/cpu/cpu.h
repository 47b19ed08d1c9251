// The CPU engine's entry points. Parameters are checked (host/problem.h); outputs are written whole.
#pragma once

#include "core/params.h"
#include "strobe/strobe.h"

namespace strobe::cpu {

void forward(const AttnParams& params, const strobe_executor& executor);
void backward(const BackwardParams& params, const strobe_executor& executor);
void kvcache(const KVCacheParams& params, const strobe_executor& executor);

// "baseline", "avx2", "avx512", "avx512_bf16" or "neon"; STROBE_CPU_ISA=<name> picks a lower one.
const char* isa_name();

}  // namespace strobe::cpu
