#include "host/plan_split.h"

#include <numeric>

namespace strobe::host {
i64 heads_in_common(const AttnParams& p) { return std::gcd(p.num_heads / p.num_heads_k, p.num_heads / p.num_heads_v); }

i64 visible_keys(const AttnParams& p, i64 tokens) {
  const bool unbounded = p.window_left < 0 || p.full_from || (p.force_fa_decode && p.seqlen_q == 1);
  if (unbounded) return p.seqlen_k;
  const i64 right = p.causal ? 0 : p.window_right < 0 ? p.seqlen_k : p.window_right;
  return min(p.seqlen_k,
             min(p.keep_first, p.seqlen_k) + min(p.window_left, p.seqlen_k) + min(right, p.seqlen_k) + tokens);
}

i64 choose_splits(i64 blocks, i64 most, i64 slots) {
  if (fills(blocks, slots)) return 1;
  const i64 limit = min(kMaxSplits, most);
  double best = 0;
  for (i64 n = 1; n <= limit; ++n) best = max(best, busy(blocks * n, slots));
  for (i64 n = 1; n <= limit; ++n)
    if (busy(blocks * n, slots) >= 0.85 * best) return n;
  return 1;
}

void reserve_splits(Plan& plan, const AttnParams& p, i64 splits) {
  plan.num_splits = int(splits);
  if (splits == 1) return;
  const i64 rows = splits * p.num_heads * p.total_q;
  plan.offsets[kPartialOut] = plan.reserve(rows * p.head_dim_v * i64(sizeof(float)));
  plan.offsets[kPartialState] = plan.reserve(rows * 2 * i64(sizeof(float)));
}

void add_combine(Plan& plan, const AttnParams& p, const DeviceInfo& device) {
  if (plan.num_splits == 1) return;
  const CombineConfig config = {i32(p.dtype), i32(p.head_dim_v), rows_of_block(plan.num_splits)};
  Launch& combine = plan.add();
  combine.kernel = kernel_ref(kCombine, config);
  const i64 units = p.batch * p.num_heads * CombineLaunch::units(p, plan.num_splits);
  combine.grid[0] = u32(ceil_div<i64>(units, max(1, config.rows / kCombineRows)));
  combine.threads = u32(threads(config));
  combine.smem = u32(smem_bytes(config));
  combine.overlaps = device.arch >= 90;
}

Partials partials_of(const Plan& plan, void* workspace) {
  if (plan.num_splits == 1) return {nullptr, nullptr};
  char* const base = static_cast<char*>(workspace);
  return {reinterpret_cast<float*>(base + plan.offsets[kPartialOut]),
          reinterpret_cast<float*>(base + plan.offsets[kPartialState])};
}

void fill_combine(const AttnParams& p, const Plan& plan, void* workspace, LaunchParams& params) {
  if (plan.num_splits == 1) return;
  const Partials parts = partials_of(plan, workspace);
  params.emplace<CombineLaunch>(int(plan.values[kForwardAt]) + 1) =
      CombineLaunch::of(p, parts.out, parts.state, plan.num_splits);
}

}  // namespace strobe::host
