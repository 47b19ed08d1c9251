#include "host/cuda_engine.h"

#include <cstdlib>

#include "host/jit.h"
#include "host/launch.h"
#include "host/plan_backward.h"
#include "host/plan_forward.h"
#include "host/plan_sm90.h"

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

// Whether another kernel runs before attention.
bool appends(const KVCacheParams& c) { return (c.k_new.data && c.fwd.seqlen_new > 0) || c.rotary_dim > 0; }

bool on_sm90(const host::Plan& plan) { return plan.count > 0 && plan.launches[0].kernel.source == &host::kFwdSm90; }

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
  const char* why = "backend is 'sm80'";
  if (params.engine != Engine::sm80) {
    why = host::refusal_sm90(params, device);
    if (params.engine == Engine::sm90 && why) [[unlikely]]
      throw Error(STROBE_UNSUPPORTED, std::string("backend 'sm90' cannot serve this call because ") + why);
    if (!why && (params.engine == Engine::sm90 || host::prefers_sm90(params, device))) {
      host::Plan plan = host::plan_forward_sm90(params, device);
      plan.why = params.engine == Engine::sm90 ? "backend is 'sm90'" : "it is the faster engine for this shape";
      return plan;
    }
    if (!why) why = "it is the faster engine for this shape";
  }
  check_forward_fits(params, device);
  host::Plan plan = host::plan_forward(params, device);
  plan.why = why;
  return plan;
}
host::Plan plan(const AttnParams& params, const host::Device& device) { return plan(params, device.info); }
host::Plan plan(const BackwardParams& params, const host::Device& device) {
  if (params.fwd.page_size) {
    throw Error(STROBE_UNSUPPORTED, "page_table is given, allowed is none where gradients are computed on a GPU");
  }
  return host::plan_backward(params, device.info);
}
host::Plan plan(const KVCacheParams& params, const host::Device& device) {
  if (!appends(params)) return plan(params.fwd, device.info);
  if (params.fwd.engine == Engine::sm90)
    throw Error(STROBE_UNSUPPORTED,
                "backend 'sm90' cannot serve this call because keys are appended or queries turned before it");
  check_forward_fits(params.fwd, device.info);
  return host::plan_kvcache(params, device.info);
}

std::string explain(const host::Plan& plan) {
  if (plan.count == 0) return "nothing to compute";
  std::string text;
  for (int i = 0; i < plan.count; ++i) {
    const host::Launch& l = plan.launches[i];
    text += describe(l.kernel) + ": " + std::to_string(l.grid[0]) + " blocks of " + std::to_string(l.threads) +
            " threads, " + std::to_string(l.smem) + " bytes of shared memory\n";
  }
  text += std::to_string(plan.num_splits) + (plan.num_splits == 1 ? " split of the keys, " : " splits of the keys, ") +
          std::to_string(plan.workspace_bytes) + " bytes of workspace\n";
  if (plan.why) text += std::string("engine chosen because ") + plan.why + "\n";
  return text;
}

void run(const AttnParams& params, const host::Plan& plan, const host::Device& device, void* workspace, void* stream) {
  run_plan(params, plan, device, workspace, stream, on_sm90(plan) ? host::fill_forward_sm90 : host::fill_forward);
}
void run(const BackwardParams& params, const host::Plan& plan, const host::Device& device, void* workspace,
         void* stream) {
  run_plan(params, plan, device, workspace, stream, host::fill_backward);
}
void run(const KVCacheParams& params, const host::Plan& plan, const host::Device& device, void* workspace,
         void* stream) {
  if (on_sm90(plan)) return run(params.fwd, plan, device, workspace, stream);
  run_plan(params, plan, device, workspace, stream, host::fill_kvcache);
}

}  // namespace strobe::cuda
