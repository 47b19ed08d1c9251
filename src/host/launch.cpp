#include "host/launch.h"

#include <algorithm>

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

// Of the driver's enumerations: 128-byte swizzle, and what is outside of the tensor reads as 0.
constexpr int kSwizzle128 = 3, kPromotion256 = 3, kNoInterleave = 0, kZeroFill = 0;
constexpr int kFloat16 = 6, kBfloat16 = 9;
constexpr u32 kClusterDimension = 4, kProgrammaticStreamSerialization = 6;
constexpr int kOverlapsInGraphs = 12030;  // older drivers do not capture launches that overlap

void encode(const TensorBox& b) {
  static constexpr u32 kEach[kBoxRank] = {1, 1, 1, 1};
  check_cuda(
      driver().cuTensorMapEncodeTiled(b.map, b.dtype == DType::f16 ? kFloat16 : kBfloat16, kBoxRank, b.data, b.dims,
                                      b.strides, b.box, kEach, kNoInterleave, kSwizzle128, kPromotion256, kZeroFill),
      "describe a tensor to the GPU");
}

}  // namespace

void launch(const Plan& plan, LaunchParams& params, const Device& device, CUstream stream) {
  const Driver& d = driver();
  CUfunction functions[kMaxLaunches];
  load(plan, device, stream, functions);
  for (int i = 0; i < params.box_count; ++i) encode(params.boxes[i]);
  if (plan.zero_bytes > 0) {
    check_cuda(d.cuMemsetD8Async(reinterpret_cast<CUdeviceptr>(params.zero), 0, size_t(plan.zero_bytes), stream),
               "clear the workspace");
  }
  for (int i = 0; i < plan.count; ++i) {
    const Launch& l = plan.launches[i];
    if (l.grid[0] == 0 || l.grid[1] == 0 || l.grid[2] == 0) continue;
    void* arguments[] = {params.blocks[i]};
    LaunchAttribute attributes[2];
    u32 count = 0;
    if (l.cluster > 1) {
      attributes[count] = {kClusterDimension, 0, {}};
      const u32 blocks[] = {l.cluster, 1, 1};
      std::copy_n(blocks, 3, attributes[count++].cluster);
    }
    if (l.overlaps && d.version >= kOverlapsInGraphs) {
      attributes[count] = {kProgrammaticStreamSerialization, 0, {}};
      attributes[count++].value = 1;
    }
    const LaunchConfig config = {
        {l.grid[0], l.grid[1], l.grid[2]}, {l.threads, 1, 1}, l.smem, stream, attributes, count};
    const CUresult result = d.cuLaunchKernelEx(&config, functions[i], arguments, nullptr);
    if (result != kCudaSuccess) [[unlikely]]
      fail_launch(result, l);
  }
}

}  // namespace strobe::host
