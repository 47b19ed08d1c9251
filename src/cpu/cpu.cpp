// Picks the engine for this processor once.
#include "cpu/cpu.h"

#include <cstdlib>
#include <cstring>

#include "cpu/engine.h"

namespace strobe::cpu {
namespace {

const Engine& pick() {
  // From the fastest to the one that always runs.
  const Engine* found[5];
  int n = 0;
#if defined(__x86_64__)
  // Every processor with AVX2 has F16C, which clang 15 cannot ask for.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  [[maybe_unused]] const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                                       __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                                       __builtin_cpu_supports("avx512vl");
#if defined(STROBE_BUILT_avx512_bf16)
  if (avx512 && __builtin_cpu_supports("avx512bf16")) found[n++] = &engine_avx512_bf16;
#endif
#if defined(STROBE_BUILT_avx512)
  if (avx512) found[n++] = &engine_avx512;
#endif
#if defined(STROBE_BUILT_avx2)
  if (avx2) found[n++] = &engine_avx2;
#endif
  found[n++] = &engine_baseline;
#elif defined(__aarch64__)
  found[n++] = &engine_neon;
#else
  found[n++] = &engine_baseline;
#endif
  const char* wanted = std::getenv("STROBE_CPU_ISA");
  for (int i = 0; wanted && i < n; ++i)
    if (std::strcmp(wanted, found[i]->name) == 0) return *found[i];
  return *found[0];
}

const Engine& engine() {
  static const Engine& picked = pick();
  return picked;
}

}  // namespace

void forward(const AttnParams& params, const strobe_executor& executor) { engine().forward(params, executor); }
void backward(const BackwardParams& params, const strobe_executor& executor) { engine().backward(params, executor); }
const char* isa_name() { return engine().name; }

}  // namespace strobe::cpu
