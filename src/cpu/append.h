// What a call with a cache does before attention: new keys and values into the cache, rotary position on q.
#pragma once

#include <cstddef>

#include "core/params.h"
#include "strobe/strobe.h"

namespace strobe::cpu {

// Writes k_new and v_new into the caches of `params.fwd` at rows seqused_k[b] + i, through cache_batch_idx and the page
// table. Rows count from the cache's start, left padding included. Where rotary_dim > 0, keys are turned by that row.
void append_kv(const KVCacheParams& params, const strobe_executor& executor);

// Bytes that rotate_q() writes.
size_t rotated_q_bytes(const KVCacheParams& params);

// Writes the rotated q, contiguous [batch, seqlen_q, num_heads, head_dim], to `q_out`: rotated_q_bytes() bytes aligned
// to the element, which the caller owns and keeps until attention is done. Returns what to put in AttnParams::q. Row i
// is turned by seqused_k[b] + i under a causal mask or a window, by seqused_k[b] else. Needs rotary_dim > 0.
Rows rotate_q(const KVCacheParams& params, void* q_out, const strobe_executor& executor);

}  // namespace strobe::cpu
