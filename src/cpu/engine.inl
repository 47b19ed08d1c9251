// The engine for the instruction set of the file that includes this; STROBE_ISA names it.
#include "core/base.h"

// The core's inline functions are shared by name: they must not leave this file as code for its instruction set.
#undef STROBE_HD
#define STROBE_HD inline __attribute__((always_inline))

#include "engine.h"
#include "forward.h"

#define STROBE_CONCAT_(a, b) a##b
#define STROBE_CONCAT(a, b) STROBE_CONCAT_(a, b)
#define STROBE_NAME_(a) #a
#define STROBE_NAME(a) STROBE_NAME_(a)

namespace strobe::cpu {

const Engine STROBE_CONCAT(engine_, STROBE_ISA) = {STROBE_NAME(STROBE_ISA), STROBE_ISA::forward};

}  // namespace strobe::cpu
