// The CUDA driver, opened at run time: own declarations of the calls that Strobe uses, in one table of functions.
#pragma once

#include <cstddef>

#include "core/base.h"

namespace strobe::host {

// The driver's types, under its names. Handles are opaque.
using CUresult = int;
using CUdevice = int;
using CUcontext = struct CUctx_st*;
using CUmodule = struct CUmod_st*;
using CUfunction = struct CUfunc_st*;
using CUstream = struct CUstream_st*;
using CUdeviceptr = unsigned long long;

constexpr CUresult kCudaSuccess = 0;
constexpr CUresult kCudaOutOfMemory = 2;

// CUlaunchAttribute and CUlaunchConfig.
struct alignas(8) LaunchAttribute {
  u32 id, padding;
  union {
    char bytes[64];
    int value;
    u32 cluster[3];
  };
};
struct LaunchConfig {
  unsigned grid[3], block[3], smem_bytes;
  CUstream stream;
  LaunchAttribute* attributes;
  unsigned attribute_count;
};

struct Driver {
  CUresult (*cuInit)(unsigned flags);
  CUresult (*cuDriverGetVersion)(int* version);
  CUresult (*cuGetErrorName)(CUresult error, const char** name);
  CUresult (*cuDeviceGet)(CUdevice* device, int ordinal);
  CUresult (*cuDeviceGetCount)(int* count);
  CUresult (*cuDeviceGetAttribute)(int* value, int attribute, CUdevice device);
  CUresult (*cuDevicePrimaryCtxRetain)(CUcontext* context, CUdevice device);
  CUresult (*cuCtxGetCurrent)(CUcontext* context);
  CUresult (*cuCtxSetCurrent)(CUcontext context);
  CUresult (*cuModuleLoadData)(CUmodule* module, const void* image);
  CUresult (*cuModuleGetFunction)(CUfunction* function, CUmodule module, const char* name);
  CUresult (*cuFuncSetAttribute)(CUfunction function, int attribute, int value);
  CUresult (*cuStreamIsCapturing)(CUstream stream, int* status);
  CUresult (*cuThreadExchangeStreamCaptureMode)(int* mode);
  CUresult (*cuMemsetD8Async)(CUdeviceptr to, unsigned char value, size_t bytes, CUstream stream);
  // `map` is 128 bytes, aligned to 64.
  CUresult (*cuTensorMapEncodeTiled)(void* map, int type, u32 rank, void* data, const u64* dims, const u64* strides,
                                     const u32* box, const u32* element_strides, int interleave, int swizzle,
                                     int l2_promotion, int fill);
  CUresult (*cuLaunchKernelEx)(const LaunchConfig* config, CUfunction function, void** params, void** extra);

  int version;  // 13000 is CUDA 13.0
};

// The initialised driver. Throws Error where there is none, where it is too old or where it does not start.
const Driver& driver();
// Its version, or 0 where driver() would throw.
int driver_version() noexcept;
// Throws Error("cannot <what>: CUDA_ERROR_...").
[[noreturn, gnu::cold]] void fail_cuda(CUresult result, const char* what);

inline void check_cuda(CUresult result, const char* what) {
  if (result != kCudaSuccess) [[unlikely]]
    fail_cuda(result, what);
}

}  // namespace strobe::host
