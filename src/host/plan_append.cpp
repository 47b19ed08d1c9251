#include "host/plan_append.h"

#include "host/plan_split.h"

namespace strobe::host {
namespace {

bool turns_q(const KVCacheParams& c) { return c.rotary_dim > 0 && !empty(c.fwd); }

}  // namespace

void add_append(Plan& plan, const KVCacheParams& c) {
  const AttnParams& p = c.fwd;
  const bool appends = c.k_new.data && p.seqlen_new > 0, turns = turns_q(c);
  if (turns) plan.offsets[kTurnedQ] = plan.reserve(p.batch * p.seqlen_q * p.num_heads * p.head_dim * 2);
  const i64 rows = p.batch * ((appends ? p.seqlen_new * (p.num_heads_k + p.num_heads_v) : 0) +
                              (turns ? p.seqlen_q * p.num_heads : 0));
  if (rows == 0) return;
  const AppendConfig config = {i32(p.dtype)};
  Launch& append = plan.add();
  append.kernel = kernel_ref(kAppendKV, config);
  append.grid[0] = u32(ceil_div<i64>(rows, threads(config) / 32));
  append.threads = u32(threads(config));
}

AttnParams attention_of(const KVCacheParams& c, const Plan& plan, void* workspace) {
  AttnParams p = c.fwd;
  if (!turns_q(c)) return p;
  void* const q = static_cast<char*>(workspace) + plan.offsets[kTurnedQ];
  p.q = {q, p.seqlen_q * p.num_heads * p.head_dim, p.num_heads * p.head_dim, p.head_dim};
  return p;
}

void fill_append(const KVCacheParams& c, const Plan& plan, void* workspace, LaunchParams& params) {
  if (plan.count == 0 || plan.launches[0].kernel.source != &kAppendKV) return;
  void* const q = turns_q(c) ? static_cast<char*>(workspace) + plan.offsets[kTurnedQ] : nullptr;
  params.emplace<AppendLaunch>(0) = {c, q};
}

}  // namespace strobe::host
