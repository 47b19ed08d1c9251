#include "host/launch.h"

#include "host/jit.h"
#include "host/registry.h"

namespace strobe::host {
namespace {

[[noreturn, gnu::cold]] void fail_launch(CUresult result, const Launch& l) {
  const std::string what = "launch " + describe(l.kernel) + " with grid " + std::to_string(l.grid[0]) + " x " +
                           std::to_string(l.grid[1]) + " x " + std::to_string(l.grid[2]) + ", " +
                           std::to_string(l.threads) + " threads, " + std::to_string(l.smem) +
                           " bytes of shared memory";
  fail_cuda(result, what.c_str());
}

}  // namespace

void launch(const Plan& plan, LaunchParams& params, const Device& device, CUstream stream) {
  const Driver& d = driver();
  CUfunction functions[kMaxLaunches];
  load(plan, device, stream, functions);
  for (int i = 0; i < plan.count; ++i) {
    const Launch& l = plan.launches[i];
    if (l.grid[0] == 0 || l.grid[1] == 0 || l.grid[2] == 0) continue;
    void* arguments[] = {params.blocks[i]};
    const CUresult result = d.cuLaunchKernel(functions[i], l.grid[0], l.grid[1], l.grid[2], l.threads, 1, 1, l.smem,
                                             stream, arguments, nullptr);
    if (result != kCudaSuccess) [[unlikely]]
      fail_launch(result, l);
  }
}

}  // namespace strobe::host
