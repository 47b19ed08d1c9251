#include "host/plan_backward.h"

#include <cmath>
#include <string>

#include "host/plan_split.h"
#include "host/problem.h"

namespace strobe::host {
namespace {

// Places of the plan's offsets and values.
enum Part { kStats, kDqAcc, kTurns, kDkParts, kDvParts, kSinks, kKeptParts };
enum Value { kBlockM, kBlockN, kDqTile, kHeadsPerBlock, kFirstBlocks, kFirstHeads, kKept, kKeptTiles };
constexpr i64 kNowhere = -1;

// Tiles of all sequences, per head: packed ones may each leave a tile partly empty.
i64 tiles_of(bool packed, i64 total, i64 longest, i64 batch, i64 block) {
  return packed ? total / block + batch : batch * ceil_div(longest, block);
}
i64 q_tiles(const AttnParams& p, i64 block_m) {
  return tiles_of(p.cu_seqlens_q, p.total_q, p.seqlen_q, p.batch, block_m);
}
// Without the first ones of each sequence, where there are such.
i64 k_tiles(const AttnParams& p, i64 block_n, i64 without) {
  return tiles_of(p.cu_seqlens_k, p.total_k, max<i64>(0, p.seqlen_k - without * block_n), p.batch, block_n);
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

// How the main kernel's blocks share the query heads: some blocks of keys start first and take `first_heads` each.
struct Heads {
  i64 per_block, first_blocks, first_heads;
};

// A block takes all query heads that read the same heads of k and of v, or fewer where that leaves processors idle:
// then their dK and dV are partial and have to be summed. Where blocks are alike, as in a window, those of the waves
// that fill every processor take all heads, and only the rest is divided. Time is estimated in tiles.
Heads share_heads(const AttnParams& p, const BwdConfig& config, int sm_count) {
  constexpr double kStart = 1.7;   // of a block: its keys' way in, its gradients' way out
  constexpr double kSumRow = 0.9;  // to write and read a partial row of dK and dV, times pairs of a tile
  constexpr i64 kSamples = 32;
  const i64 share = heads_in_common(p);
  if (share == 1) return {1, 0, 1};
  const i64 blocks = longest_tiles(p.seqlen_k, config.block_n);
  const double slots = double(sm_count) * config.blocks, sequences = double(p.batch);
  const double first = double(tiles_seen(p, config, 0)), middle = double(tiles_seen(p, config, blocks / 2));
  const auto cost = [&](i64 heads, i64 whole) {
    const i64 step = ceil_div(blocks - whole, kSamples);
    double work = 0, longest = 0, samples = 0, alike = 0;  // of what is divided: tiles, blocks of nearly as many
    for (i64 n = whole; n < blocks; n += step, ++samples) {
      const double tiles = double(tiles_seen(p, config, n));
      work += tiles;
      if (tiles * 0.75 > longest) alike = 0;
      longest = max(longest, tiles);
      alike += tiles > longest * 0.75;
    }
    const double groups = double(p.num_heads) / double(heads) * sequences, count = double(blocks - whole) * groups;
    const double waves = std::ceil(count * alike / samples / slots) * (double(heads) * longest + kStart);
    double time = max(waves, count * (work / samples * double(heads) + kStart) / slots) + double(heads) * middle / 2;
    if (heads < share) time += kSumRow * count / double(config.block_m);
    if (whole > 0) {
      const double wave = double(share) * middle + kStart;
      time += wave * std::ceil(double(whole) * double(p.num_heads / share) * sequences / slots);
    }
    return max(time, double(heads) * first);
  };
  Heads best = {share, 0, share};
  double least = cost(share, 0);
  const auto consider = [&](i64 heads, i64 whole) {
    const double time = cost(heads, whole);
    if (time > 0.97 * least) return;  // no trouble for nothing
    least = time;
    best = {heads, whole, whole > 0 ? share : heads};
  };
  // All whole waves of blocks that take all heads.
  const double in_a_wave = slots / (double(p.num_heads / share) * sequences);
  const i64 waves = i64(double(blocks) / in_a_wave);
  const bool alike = first <= 1.25 * middle && p.num_heads_k == p.num_heads_v && !p.cu_seqlens_k && waves > 0;
  for (i64 heads = share - 1; heads > 0; --heads) {
    if (share % heads != 0) continue;
    consider(heads, 0);
    if (alike) consider(heads, min(blocks - 1, i64(double(waves) * in_a_wave)));
  }
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

// Tiles of queries that a block of bwd_kept takes: as many as give every processor all the blocks that it holds.
i64 kept_tiles(i64 tiles, int sm_count) {
  constexpr i64 kBlocksPerSm = 4, kMost = 16;
  return max<i64>(1, min(kMost, ceil_div(tiles, sm_count * kBlocksPerSm)));
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
  AttnParams main = p;  // what the main kernel sees of it
  i64 first = first_blocks(p, config);
  // bwd_kept takes all kept tokens, if they are few and would make one block of the main kernel much longer than
  // others.
  const i64 kept = first > 0 && p.keep_first <= kBwdKept ? p.keep_first : 0;
  if (kept > 0) main.keep_first = 0, first = 0;
  Heads heads = share_heads(main, config, device.sm_count);
  const i64 whole = heads.first_blocks, parts = p.num_heads / heads.per_block;
  if (whole == 0) heads.first_blocks = first;
  const i64 tiles = p.num_heads * q_tiles(p, config.block_m), keys = k_tiles(p, config.block_n, whole) * config.block_n;
  const i64 max_q_tiles = longest_tiles(p.seqlen_q, config.block_m);
  const i64 max_k_tiles = longest_tiles(p.seqlen_k, config.block_n);
  const i64 dq_tile = i64(config.block_m) * bwd_dq_cols(config);

  Plan plan;
  plan.values[kBlockM] = config.block_m;
  plan.values[kBlockN] = config.block_n;
  plan.values[kDqTile] = dq_tile;
  plan.values[kHeadsPerBlock] = heads.per_block;
  plan.values[kFirstBlocks] = heads.first_blocks;
  plan.values[kFirstHeads] = heads.first_heads;
  plan.values[kKept] = kept;
  plan.values[kKeptTiles] = kept_tiles(max_q_tiles * p.num_heads * p.batch, device.sm_count);
  const i64 kept_blocks = ceil_div(max_q_tiles, plan.values[kKeptTiles]);
  const auto reserve = [&](Part part, bool needed, i64 words) {
    plan.offsets[part] = needed ? plan.reserve(words * 4) : kNowhere;
  };
  reserve(kStats, true, tiles * 2 * config.block_m);
  reserve(kDqAcc, true, tiles * dq_tile);
  reserve(kTurns, params.deterministic, tiles * (config.warps + 2));
  reserve(kDkParts, parts != p.num_heads_k, parts * keys * p.head_dim);
  reserve(kDvParts, parts != p.num_heads_v, parts * keys * p.head_dim_v);
  reserve(kSinks, params.ds_aux, p.num_heads * p.batch * max_q_tiles);
  reserve(kKeptParts, kept > 0, p.num_heads * p.batch * kept_blocks * kept * (p.head_dim + p.head_dim_v));

  const auto add = [&](const KernelTemplate& kernel, const auto& c, i64 x, i64 y, i64 z) {
    Launch& launch = plan.add();
    launch.kernel = kernel_ref(kernel, c);
    launch.grid[0] = u32(x);
    launch.grid[1] = u32(y);
    launch.grid[2] = u32(z);
    launch.threads = u32(threads(c));
    launch.smem = u32(smem_bytes(c));
  };
  if (kept > 0)
    add(kBwdKeptPre,
        BwdKeptConfig{config.dtype, config.head_dim, config.head_dim_v, config.block_m, config.warps, config.warps_dq,
                      config.softcap, config.alibi, config.dropout},
        kept_blocks, p.num_heads, p.batch);
  else
    add(kBwdPre, BwdPreConfig{config.dtype, config.head_dim_v, config.block_m}, max_q_tiles, p.num_heads, p.batch);
  const i64 first_groups = p.num_heads / heads.first_heads;
  const i64 main_blocks = heads.first_blocks * first_groups + (max_k_tiles - heads.first_blocks) * parts;
  add(kBwdSm80, config, main_blocks * p.batch, 1, 1);
  add(kBwdPost, BwdPostConfig{config.dtype, config.head_dim, config.block_m, config.warps, config.warps_dq},
      max_q_tiles, p.num_heads, p.batch);
  const BwdSumConfig sum = {config.dtype};
  const auto add_sum = [&](Part part, i64 dim, i64 num_heads) {
    const i64 blocks = (max_k_tiles - whole) * bwd_sum_blocks(config.block_n, dim, threads(sum));
    if (plan.offsets[part] != kNowhere) add(kBwdSum, sum, blocks, num_heads, p.batch);
  };
  add_sum(kDkParts, p.head_dim, p.num_heads_k);
  add_sum(kDvParts, p.head_dim_v, p.num_heads_v);
  if (kept > 0) add(kBwdKeptSum, sum, kept, p.num_heads_k + p.num_heads_v, p.batch);
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
  l.max_q_tiles = longest_tiles(p.seqlen_q, block_m);
  l.max_k_tiles = longest_tiles(p.seqlen_k, block_n);
  l.dq_tile = plan.values[kDqTile];
  l.turns_per_tile = plan.launches[1].threads / 32 + 2;
  l.heads_per_block = heads;
  l.block_n = block_n;
  l.per_k = i32(p.num_heads / p.num_heads_k);
  l.per_v = i32(p.num_heads / p.num_heads_v);
  l.first_blocks = i32(plan.values[kFirstBlocks]);
  l.first_heads = i32(plan.values[kFirstHeads]);
  l.k_tiles = k_tiles(p, block_n, l.first_part());
  l.kept_parts = static_cast<float*>(at(kKeptParts));
  l.kept = i32(plan.values[kKept]);
  l.kept_tiles = i32(plan.values[kKeptTiles]);
  for (int i = 0; i < 3; ++i) blocks.emplace<BwdLaunch>(i) = l;

  int launch = 3;
  const auto add_sum = [&](Part part, const Rows& out, i64 dim, i64 num_heads) {
    if (plan.offsets[part] == kNowhere) return;  // not by the address, which is null where the workspace is empty
    BwdSumLaunch& sum = blocks.emplace<BwdSumLaunch>(launch++);
    sum = {p,
           out,
           static_cast<const float*>(at(part)),
           dim,
           p.num_heads / heads / num_heads,
           l.k_tiles,
           l.max_k_tiles,
           block_n,
           l.first_part()};
  };
  add_sum(kDkParts, params.dk, p.head_dim, p.num_heads_k);
  add_sum(kDvParts, params.dv, p.head_dim_v, p.num_heads_v);
  if (l.kept > 0) blocks.emplace<BwdLaunch>(launch) = l;
}

}  // namespace strobe::host
