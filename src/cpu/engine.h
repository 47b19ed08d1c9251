// The table of one instruction set's entry points; isa_*.cpp define one each, cpu.cpp picks.
#pragma once

#include "core/params.h"
#include "strobe/strobe.h"

namespace strobe::cpu {

struct Engine {
  const char* name;
  void (*forward)(const AttnParams&, const strobe_executor&);
  void (*backward)(const BackwardParams&, const strobe_executor&);
};

extern const Engine engine_baseline, engine_avx2, engine_avx512, engine_avx512_bf16, engine_neon;

}  // namespace strobe::cpu
