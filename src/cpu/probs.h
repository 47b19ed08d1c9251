// The probabilities that return_attn_probs asks for: a testing aid, written for clarity.
#pragma once

#include "core/params.h"

namespace strobe::cpu {

// Writes exp(score - lse), with a minus sign where dropout drops it and 0 where nothing is visible, to `s_dmask`:
// contiguous [batch, num_heads, rows_padded, cols_padded] of q's dtype. Reads params.lse as forward left it.
void probabilities(const AttnParams& params, void* s_dmask, i64 rows_padded, i64 cols_padded);

}  // namespace strobe::cpu
