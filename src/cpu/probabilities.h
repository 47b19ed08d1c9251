// The matrix of probabilities, for tests only: it is what attention otherwise never stores.
#pragma once

#include "core/params.h"

namespace strobe::cpu {

// s_dmask[batch, num_heads, rows, cols], contiguous, dtype of q: exp(score - lse), negative where dropped, 0 where
// masked or outside the sequence. Reads params.lse.
void probabilities(const AttnParams& params, void* s_dmask, i64 rows, i64 cols);

}  // namespace strobe::cpu
