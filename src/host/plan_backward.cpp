#include "host/plan_backward.h"

#include <numeric>
#include <string>

#include "host/problem.h"

namespace strobe::host {
namespace {

// Places of the plan's offsets and values.
enum Part { kStats, kDqAcc, kTurns, kDkParts, kDvParts, kSinks };
enum Value { kBlockM, kBlockN, kDqTile, kTurnsPerTile, kHeadsPerBlock, kFirstBlocks };
constexpr i64 kNowhere = -1;

// Tiles of all sequences, per head: packed ones may each leave a tile partly empty.
i64 tiles_of(bool packed, i64 total, i64 longest, i64 batch, i64 block) {
  return packed ? total / block + batch : batch * ceil_div(longest, block);
}
i64 q_tiles(const AttnParams& p, i64 block_m) {
  return tiles_of(p.cu_seqlens_q, p.total_q, p.seqlen_q, p.batch, block_m);
}
i64 k_tiles(const AttnParams& p, i64 block_n) {
  return tiles_of(p.cu_seqlens_k, p.total_k, p.seqlen_k, p.batch, block_n);
}
i64 longest_tiles(i64 longest, i64 block) { return max<i64>(1, ceil_div(longest, block)); }

// Tiles of queries that see key block n of a sequence of the greatest length.
i64 tiles_seen(const AttnParams& p, const BwdConfig& config, i64 n) {
  Mask mask;
  mask.seqlen_q = p.seqlen_q;
  mask.seqlen_k = p.seqlen_k;
  mask.left = p.window_left < 0 || p.full_from ? kUnbounded : p.window_left;
  mask.right = p.causal ? 0 : p.window_right < 0 ? kUnbounded : p.window_right;
  mask.keep_first = p.keep_first;
  mask.full_from = kUnbounded;
  return max<i64>(1, mask.visit_queries(n * config.block_n, (n + 1) * config.block_n, config.block_m).tiles());
}

// A block takes all query heads that read the same heads of k and of v, or fewer where that leaves processors idle.
// Time is estimated in tiles: of all waves, and of the first block, which may hold kept tokens that every query sees.
i64 heads_per_block(const AttnParams& p, const BwdConfig& config, int sm_count) {
  const i64 share = std::gcd(p.num_heads / p.num_heads_k, p.num_heads / p.num_heads_v);
  const i64 blocks = longest_tiles(p.seqlen_k, config.block_n);
  const i64 first = tiles_seen(p, config, 0), middle = tiles_seen(p, config, blocks / 2);
  const auto cost = [&](i64 heads) {
    const i64 waves = ceil_div<i64>(blocks * p.batch * (p.num_heads / heads), i64(sm_count) * config.blocks);
    return heads * max(waves * middle, first);
  };
  i64 best = share;
  for (i64 heads = share - 1; heads > 0; --heads)
    if (share % heads == 0 && cost(heads) * 10 < cost(best) * 9) best = heads;  // sums of partial dK and dV cost, too
  return best;
}

// Blocks at the sequences' beginnings that take much longer than others: none of them may be the last to start.
i64 first_blocks(const AttnParams& p, const BwdConfig& config) {
  constexpr i64 kMost = 64;  // more cannot end late: they are all that there is to do
  const i64 blocks = longest_tiles(p.seqlen_k, config.block_n), middle = tiles_seen(p, config, blocks / 2);
  i64 n = 0;
  if (p.keep_first > 0 && blocks * p.num_heads * p.batch < i64(1) << 31)
    while (n < min(blocks, kMost) && tiles_seen(p, config, n) > 2 * middle) ++n;
  return n;
}

[[noreturn]] void refuse_dims(const AttnParams& p) {
  throw Error(STROBE_UNSUPPORTED, "no kernel for gradients fits head_dim " + std::to_string(p.head_dim) +
                                      " and head_dim_v " + std::to_string(p.head_dim_v) +
                                      ", allowed are multiples of 8 up to 256 each");
}

}  // namespace

Plan plan_backward(const BackwardParams& params, const DeviceInfo& device) {
  const BwdTile* tile = find_bwd_tile(params, device);
  if (!tile) refuse_dims(params.fwd);
  return plan_backward(params, device, *tile);
}

Plan plan_backward(const BackwardParams& params, const DeviceInfo& device, const BwdTile& tile) {
  const AttnParams& p = params.fwd;
  const BwdConfig config = bwd_config(params, tile);
  if (!valid(config)) refuse_dims(p);
  const i64 heads = heads_per_block(p, config, device.sm_count), parts = p.num_heads / heads;
  const i64 tiles = p.num_heads * q_tiles(p, config.block_m), keys = k_tiles(p, config.block_n) * config.block_n;
  const i64 max_q_tiles = longest_tiles(p.seqlen_q, config.block_m);
  const i64 max_k_tiles = longest_tiles(p.seqlen_k, config.block_n);
  const i64 dq_tile = i64(config.block_m) * bwd_dq_cols(config);

  Plan plan;
  plan.values[kBlockM] = config.block_m;
  plan.values[kBlockN] = config.block_n;
  plan.values[kDqTile] = dq_tile;
  plan.values[kTurnsPerTile] = config.warps + 2;
  plan.values[kHeadsPerBlock] = heads;
  plan.values[kFirstBlocks] = first_blocks(p, config);
  const auto reserve = [&](Part part, bool needed, i64 words) {
    plan.offsets[part] = needed ? plan.reserve(words * 4) : kNowhere;
  };
  reserve(kStats, true, tiles * 2 * config.block_m);
  reserve(kDqAcc, true, tiles * dq_tile);
  reserve(kTurns, params.deterministic, tiles * (config.warps + 2));
  reserve(kDkParts, parts != p.num_heads_k, parts * keys * p.head_dim);
  reserve(kDvParts, parts != p.num_heads_v, parts * keys * p.head_dim_v);
  reserve(kSinks, params.ds_aux, p.num_heads * p.batch * max_q_tiles);

  const auto add = [&](const KernelTemplate& kernel, const auto& c, i64 x, i64 y) {
    Launch& launch = plan.add();
    launch.kernel = kernel_ref(kernel, c);
    launch.grid[0] = u32(x);
    launch.grid[1] = u32(y);
    launch.grid[2] = u32(p.batch);
    launch.threads = u32(threads(c));
    launch.smem = u32(smem_bytes(c));
  };
  add(kBwdPre, BwdPreConfig{config.dtype, config.head_dim_v, config.block_m}, max_q_tiles, p.num_heads);
  add(kBwdSm80, config, max_k_tiles, parts);
  add(kBwdPost, BwdPostConfig{config.dtype, config.head_dim, config.block_m, config.warps, config.warps_dq},
      max_q_tiles, p.num_heads);
  if (plan.offsets[kDkParts] != kNowhere) add(kBwdSum, BwdSumConfig{config.dtype}, max_k_tiles, p.num_heads_k);
  if (plan.offsets[kDvParts] != kNowhere) add(kBwdSum, BwdSumConfig{config.dtype}, max_k_tiles, p.num_heads_v);
  return plan;
}

void fill_backward(const BackwardParams& params, const Plan& plan, void* workspace, LaunchParams& blocks) {
  const AttnParams& p = params.fwd;
  const i64 block_m = plan.values[kBlockM], block_n = plan.values[kBlockN], heads = plan.values[kHeadsPerBlock];
  const auto at = [&](Part part) -> void* {
    return plan.offsets[part] == kNowhere ? nullptr : static_cast<char*>(workspace) + plan.offsets[part];
  };
  BwdLaunch l = {};
  l.p = params;
  l.stats = static_cast<float*>(at(kStats));
  l.dq_acc = static_cast<float*>(at(kDqAcc));
  l.turns = static_cast<u32*>(at(kTurns));
  l.dk_parts = static_cast<float*>(at(kDkParts));
  l.dv_parts = static_cast<float*>(at(kDvParts));
  l.sinks = static_cast<float*>(at(kSinks));
  l.q_tiles = q_tiles(p, block_m);
  l.k_tiles = k_tiles(p, block_n);
  l.max_q_tiles = longest_tiles(p.seqlen_q, block_m);
  l.max_k_tiles = longest_tiles(p.seqlen_k, block_n);
  l.dq_tile = plan.values[kDqTile];
  l.turns_per_tile = plan.values[kTurnsPerTile];
  l.heads_per_block = heads;
  l.block_n = block_n;
  l.per_k = i32(p.num_heads / p.num_heads_k);
  l.per_v = i32(p.num_heads / p.num_heads_v);
  l.first_blocks = i32(plan.values[kFirstBlocks]);
  for (int i = 0; i < 3; ++i) blocks.emplace<BwdLaunch>(i) = l;

  int launch = 3;
  const auto add_sum = [&](const float* parts, const Rows& out, i64 dim, i64 num_heads) {
    if (!parts) return;
    BwdSumLaunch& sum = blocks.emplace<BwdSumLaunch>(launch++);
    sum = {p, out, parts, dim, p.num_heads / heads / num_heads, l.k_tiles, l.max_k_tiles, block_n};
  };
  add_sum(l.dk_parts, params.dk, p.head_dim, p.num_heads_k);
  add_sum(l.dv_parts, params.dv, p.head_dim_v, p.num_heads_v);
}

}  // namespace strobe::host
