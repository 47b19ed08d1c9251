#include "host/cuda_engine.h"

#include <cstdlib>

#include "host/jit.h"
#include "host/launch.h"
#include "host/plan_append.h"
#include "host/plan_backward.h"
#include "host/plan_forward.h"
#include "host/plan_sm90.h"
#include "host/plan_split.h"

namespace strobe::cuda {
namespace {

// Larger head dims than any kernel has.
constexpr i64 kSearchedDim = 640;

void check_workspace(const host::Plan& plan, void* workspace) {
  if (plan.workspace_bytes == 0) return;
  if (workspace && reinterpret_cast<uintptr_t>(workspace) % host::kWorkspaceAlign == 0) return;
  throw Error(STROBE_INVALID_VALUE,
              "the workspace is missing or not aligned, allowed is device memory that starts at "
              "a multiple of " +
                  std::to_string(host::kWorkspaceAlign));
}

bool on_sm90(const host::Plan& plan) {
  const host::Launch& forward = plan.launches[plan.values[host::kForwardAt]];
  return plan.count > 0 && forward.kernel.source == &host::kFwdSm90;
}

[[noreturn, gnu::cold]] void refuse_head_dims(AttnParams p, const host::DeviceInfo& device) {
  const i64 head_dim = p.head_dim, head_dim_v = p.head_dim_v;
  i64 nearest = 2 * kSearchedDim, near_dim = 0, near_dim_v = 0;
  for (p.head_dim = 8; p.head_dim <= kSearchedDim; p.head_dim += 8) {
    for (p.head_dim_v = 8; p.head_dim_v <= kSearchedDim; p.head_dim_v += 8) {
      const i64 distance = std::abs(p.head_dim - head_dim) + std::abs(p.head_dim_v - head_dim_v);
      if (distance >= nearest || !host::forward_fits(p, device)) continue;
      nearest = distance;
      near_dim = p.head_dim;
      near_dim_v = p.head_dim_v;
    }
  }
  throw Error(STROBE_UNSUPPORTED, "no kernel for sm_" + std::to_string(device.arch) + " fits head_dim " +
                                      std::to_string(head_dim) + " of q and k with " + std::to_string(head_dim_v) +
                                      " of v, the nearest that fit are " + std::to_string(near_dim) + " and " +
                                      std::to_string(near_dim_v));
}

void fill_attention(const AttnParams& p, const host::Plan& plan, void* workspace, host::LaunchParams& params) {
  (on_sm90(plan) ? host::fill_forward_sm90 : host::fill_forward)(p, plan, workspace, params);
}

// Picks the engine.
void add_attention(host::Plan& plan, const AttnParams& params, const host::DeviceInfo& device) {
  plan.why = "backend is 'sm80'";
  if (params.engine != Engine::sm80) {
    const char* const refusal = host::refusal_sm90(params, device);
    const bool asked = params.engine == Engine::sm90;
    if (asked && refusal) [[unlikely]]
      throw Error(STROBE_UNSUPPORTED, std::string("backend 'sm90' cannot serve this call because ") + refusal);
    plan.why = refusal ? refusal : asked ? "backend is 'sm90'" : "it is the faster engine for this shape";
    if (!refusal && (asked || host::prefers_sm90(params, device))) return host::add_forward_sm90(plan, params, device);
  }
  check_forward_fits(params, device);
  host::add_forward(plan, params, device);
}

template <class Params, class Fill>
void run_plan(const Params& params, const host::Plan& plan, const host::Device& device, void* workspace, void* stream,
              Fill fill) {
  check_workspace(plan, workspace);
  const host::CurrentDevice current(device);
  host::LaunchParams blocks;
  fill(params, plan, workspace, blocks);
  host::launch(plan, blocks, device, static_cast<host::CUstream>(stream));
}

}  // namespace

void check_forward_fits(const AttnParams& params, const host::DeviceInfo& device) {
  if (!host::forward_fits(params, device)) [[unlikely]]
    refuse_head_dims(params, device);
}

host::Plan plan(const AttnParams& params, const host::DeviceInfo& device) {
  host::Plan plan;
  add_attention(plan, params, device);
  return plan;
}
host::Plan plan(const AttnParams& params, const host::Device& device) { return plan(params, device.info); }
host::Plan plan(const BackwardParams& params, const host::Device& device) {
  if (params.fwd.page_size) {
    throw Error(STROBE_UNSUPPORTED, "page_table is given, allowed is none where gradients are computed on a GPU");
  }
  return host::plan_backward(params, device.info);
}
host::Plan plan(const KVCacheParams& params, const host::DeviceInfo& device) {
  host::Plan plan;
  host::add_append(plan, params);
  add_attention(plan, host::attention_of(params, plan, nullptr), device);
  return plan;
}
host::Plan plan(const KVCacheParams& params, const host::Device& device) { return plan(params, device.info); }

std::string explain(const host::Plan& plan) {
  if (plan.count == 0) return "nothing to compute";
  std::string text;
  for (int i = 0; i < plan.count; ++i) {
    const host::Launch& l = plan.launches[i];
    text += describe(l.kernel) + ": " + std::to_string(l.grid[0]) + " blocks of " + std::to_string(l.threads) +
            " threads, " + (l.cluster > 1 ? "in clusters of " + std::to_string(l.cluster) + ", " : "") +
            std::to_string(l.smem) + " bytes of shared memory\n";
  }
  text += std::to_string(plan.num_splits) + (plan.num_splits == 1 ? " split of the keys, " : " splits of the keys, ") +
          std::to_string(plan.workspace_bytes) + " bytes of workspace\n";
  if (plan.why) text += std::string("engine chosen because ") + plan.why + "\n";
  return text;
}

void run(const AttnParams& params, const host::Plan& plan, const host::Device& device, void* workspace, void* stream) {
  run_plan(params, plan, device, workspace, stream, fill_attention);
}
void run(const BackwardParams& params, const host::Plan& plan, const host::Device& device, void* workspace,
         void* stream) {
  run_plan(params, plan, device, workspace, stream, host::fill_backward);
}
void run(const KVCacheParams& params, const host::Plan& plan, const host::Device& device, void* workspace,
         void* stream) {
  run_plan(params, plan, device, workspace, stream, [](const auto& c, const auto& plan, void* space, auto& blocks) {
    host::fill_append(c, plan, space, blocks);
    fill_attention(host::attention_of(c, plan, space), plan, space, blocks);
  });
}

}  // namespace strobe::cuda
