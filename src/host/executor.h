// Strobe's own threads: what a call runs on where its caller hands in no executor.
#pragma once

#include "strobe/strobe.h"

namespace strobe {

// Made on first use, kept until the process ends. STROBE_NUM_THREADS sets the number of threads, the caller included;
// without it there is one per core. Calls from several threads, from tasks and after fork() are fine.
const strobe_executor& default_executor();

}  // namespace strobe
