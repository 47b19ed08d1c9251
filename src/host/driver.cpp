#include "host/driver.h"

#include <dlfcn.h>

#include <string>

#include "host/problem.h"

namespace strobe::host {
namespace {

// CUDA 12.0, driver 525: the oldest that takes what NVRTC 12 compiles.
constexpr int kOldestDriver = 12000;

template <class Function>
void find(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  if (!function) throw Error(STROBE_UNSUPPORTED, std::string("the NVIDIA driver is too old: it has no ") + name);
}

Driver open_driver() {
  void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (!library) {
    throw Error(STROBE_UNSUPPORTED,
                "CUDA tensors need the NVIDIA driver, and libcuda.so.1 cannot be opened: install the driver, version "
                "525 or later");
  }
  Driver d{};
#define STROBE_FIND(name) find(library, #name, d.name)
  STROBE_FIND(cuInit);
  STROBE_FIND(cuDriverGetVersion);
  STROBE_FIND(cuGetErrorName);
  STROBE_FIND(cuDeviceGet);
  STROBE_FIND(cuDeviceGetCount);
  STROBE_FIND(cuDeviceGetAttribute);
  STROBE_FIND(cuDevicePrimaryCtxRetain);
  STROBE_FIND(cuCtxGetCurrent);
  STROBE_FIND(cuCtxSetCurrent);
  STROBE_FIND(cuModuleLoadData);
  STROBE_FIND(cuModuleGetFunction);
  STROBE_FIND(cuFuncSetAttribute);
  STROBE_FIND(cuStreamIsCapturing);
  STROBE_FIND(cuThreadExchangeStreamCaptureMode);
  STROBE_FIND(cuLaunchKernelEx);
  STROBE_FIND(cuMemsetD8Async);
  STROBE_FIND(cuTensorMapEncodeTiled);
#undef STROBE_FIND
  if (d.cuDriverGetVersion(&d.version) != kCudaSuccess || d.version < kOldestDriver) {
    throw Error(STROBE_UNSUPPORTED, "the NVIDIA driver serves CUDA " + std::to_string(d.version / 1000) + "." +
                                        std::to_string(d.version % 1000 / 10) +
                                        ", Strobe needs 12.0: install driver 525 or later");
  }
  if (const CUresult result = d.cuInit(0); result != kCudaSuccess) {
    const char* name = nullptr;
    d.cuGetErrorName(result, &name);
    throw Error(STROBE_UNSUPPORTED,
                std::string("the NVIDIA driver does not start: ") + (name ? name : "cuInit failed"));
  }
  return d;
}

}  // namespace

const Driver& driver() {
  static const Driver opened = open_driver();
  return opened;
}

int driver_version() noexcept {
  try {
    return driver().version;
  } catch (...) {
    return 0;
  }
}

void fail_cuda(CUresult result, const char* what) {
  const char* name = nullptr;
  if (driver().cuGetErrorName(result, &name) != kCudaSuccess || !name) name = "an unknown CUDA error";
  const char* hint = result == kCudaOutOfMemory ? ": the GPU is out of memory" : "";
  throw Error(STROBE_INTERNAL, std::string("cannot ") + what + ": " + name + hint);
}

}  // namespace strobe::host
