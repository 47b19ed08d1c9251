// What the forward plans of all engines share: where a Plan keeps things, and the splitting of keys over blocks with
// the launch that merges the parts.
#pragma once

#include "core/config.h"
#include "core/launch.h"
#include "host/plan.h"

namespace strobe::host {

inline constexpr KernelTemplate kCombine =
    kernel_template<CombineConfig>("cuda/combine.cuh", "strobe::combine", "strobe::CombineConfig");

// What the offsets and values of a forward plan hold.
enum ForwardOffset { kPartialOut, kPartialState, kTurnedQ, kCounter };
enum ForwardValue { kForwardAt, kGroup, kRowBlocks, kSection, kTiles, kDynamic };

constexpr bool empty(const AttnParams& p) {
  return p.batch == 0 || p.num_heads == 0 || p.seqlen_q == 0 || p.total_q == 0;
}

// Query heads that have their heads of K and of V in common.
i64 heads_in_common(const AttnParams& p);

// Keys that a row block of `tokens` queries can see at most.
i64 visible_keys(const AttnParams& p, i64 tokens);

constexpr i64 kMaxSplits = 128;

// Whether blocks keep nearly all of `slots`, the places for blocks on the GPU, busy.
constexpr bool fills(i64 blocks, i64 slots) { return blocks * 5 >= slots * 4; }

// The share of its time that a slot works, where all blocks take the same time.
constexpr double busy(i64 blocks, i64 slots) { return double(blocks) / double(ceil_div(blocks, slots) * slots); }

// The fewest splits that keep `slots` nearly as busy as the best number does.
// `blocks`: without splits. `most`: splits that leave each of them enough to do.
i64 choose_splits(i64 blocks, i64 most, i64 slots);

// Sets the plan's number of splits and reserves their partial results.
void reserve_splits(Plan& plan, const AttnParams& p, i64 splits);
// The launch that merges them, where there are any.
void add_combine(Plan& plan, const AttnParams& p, const DeviceInfo& device);

// Partial results in the workspace: null without splits.
struct Partials {
  float* out;
  float* state;
};
Partials partials_of(const Plan& plan, void* workspace);
void fill_combine(const AttnParams& p, const Plan& plan, void* workspace, LaunchParams& params);

}  // namespace strobe::host
