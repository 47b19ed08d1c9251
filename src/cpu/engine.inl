// The engine for the instruction set of the file that includes this; STROBE_ISA names it.
#include "core/base.h"

// The core's inline functions are shared by name: they must not leave this file as code for its instruction set.
#undef STROBE_HD
#define STROBE_HD inline __attribute__((always_inline))

#include "backward.h"
#include "decode.h"
#include "engine.h"
#include "forward.h"

#define STROBE_CONCAT_(a, b) a##b
#define STROBE_CONCAT(a, b) STROBE_CONCAT_(a, b)
#define STROBE_NAME_(a) #a
#define STROBE_NAME(a) STROBE_NAME_(a)

namespace strobe::cpu {
namespace STROBE_ISA {

// Few query rows are a matter of memory bandwidth, and have a path of their own.
inline void attend(const AttnParams& params, const strobe_executor& executor) {
  decode_applies(params) ? decode(params, executor) : forward(params, executor);
}

}  // namespace STROBE_ISA

const Engine STROBE_CONCAT(engine_, STROBE_ISA) = {STROBE_NAME(STROBE_ISA), STROBE_ISA::attend, STROBE_ISA::backward};

}  // namespace strobe::cpu
