#include "host/device.h"

#include <atomic>
#include <mutex>
#include <string>

#include "host/problem.h"

namespace strobe::host {
namespace {

constexpr int kMaxDevices = 128;
constexpr int kOldestArch = 80;

// CUdevice_attribute
constexpr int kMultiprocessorCount = 16;
constexpr int kL2CacheSize = 38;
constexpr int kComputeCapabilityMajor = 75;
constexpr int kComputeCapabilityMinor = 76;
constexpr int kMaxSmemPerMultiprocessor = 81;
constexpr int kMaxSmemPerBlockOptin = 97;

std::atomic<const Device*> devices[kMaxDevices];
std::mutex opening;

const Device* open_device(int ordinal) {
  const Driver& d = driver();
  const std::string name = "cuda:" + std::to_string(ordinal);
  int count = 0;
  check_cuda(d.cuDeviceGetCount(&count), "count the GPUs");
  if (ordinal < 0 || ordinal >= count || ordinal >= kMaxDevices) {
    throw Error(STROBE_INVALID_VALUE, "there is no " + name + ": the driver shows " + std::to_string(count) + " GPUs");
  }
  CUdevice handle;
  check_cuda(d.cuDeviceGet(&handle, ordinal), "open the GPU");
  const auto read = [&](int attribute) {
    int value = 0;
    check_cuda(d.cuDeviceGetAttribute(&value, attribute, handle), "read the GPU's attributes");
    return value;
  };
  Device result;
  result.ordinal = ordinal;
  DeviceInfo& info = result.info;
  info.arch = 10 * read(kComputeCapabilityMajor) + read(kComputeCapabilityMinor);
  if (info.arch < kOldestArch) {
    throw Error(STROBE_UNSUPPORTED, name + " is sm_" + std::to_string(info.arch) +
                                        ", allowed is sm_80 (Ampere) or later; CPU tensors work everywhere");
  }
  info.sm_count = read(kMultiprocessorCount);
  info.smem_per_block = read(kMaxSmemPerBlockOptin);
  info.smem_per_sm = read(kMaxSmemPerMultiprocessor);
  info.l2_bytes = read(kL2CacheSize);
  check_cuda(d.cuDevicePrimaryCtxRetain(&result.context, handle), "use the GPU");
  return new Device(result);  // as long-lived as the process
}

}  // namespace

const Device& device(int ordinal) {
  if (ordinal >= 0 && ordinal < kMaxDevices) [[likely]] {
    if (const Device* known = devices[ordinal].load(std::memory_order_acquire)) [[likely]]
      return *known;
  }
  const std::lock_guard lock(opening);
  if (ordinal >= 0 && ordinal < kMaxDevices) {
    if (const Device* known = devices[ordinal].load(std::memory_order_acquire)) return *known;
  }
  const Device* opened = open_device(ordinal);
  devices[ordinal].store(opened, std::memory_order_release);
  return *opened;
}

DeviceInfo typical_device(int arch) {
  constexpr i64 kKiB = 1024;
  // arch, SMs, shared memory of a block and of an SM, L2: of A100, Orin, RTX 3090, RTX 4090, H100, B200, RTX 5090.
  static constexpr DeviceInfo kKnown[] = {
      {80, 108, 163 * kKiB, 164 * kKiB, 40960 * kKiB}, {86, 82, 99 * kKiB, 100 * kKiB, 6144 * kKiB},
      {87, 16, 163 * kKiB, 164 * kKiB, 4096 * kKiB},   {89, 128, 99 * kKiB, 100 * kKiB, 73728 * kKiB},
      {90, 132, 227 * kKiB, 228 * kKiB, 51200 * kKiB}, {100, 148, 227 * kKiB, 228 * kKiB, 129024 * kKiB},
      {120, 170, 99 * kKiB, 100 * kKiB, 98304 * kKiB},
  };
  std::string names;
  for (const DeviceInfo& info : kKnown) {
    if (info.arch == arch) return info;
    names += (names.empty() ? "" : ", ") + std::to_string(info.arch);
  }
  throw Error(STROBE_INVALID_VALUE, "architecture is " + std::to_string(arch) + ", allowed is one of " + names);
}

CurrentDevice::CurrentDevice(const Device& device) {
  const Driver& d = driver();
  check_cuda(d.cuCtxGetCurrent(&previous_), "read the current context");
  if (previous_ == device.context) [[likely]]
    return;
  check_cuda(d.cuCtxSetCurrent(device.context), "make the GPU current");
  changed_ = true;
}

CurrentDevice::~CurrentDevice() {
  if (changed_) driver().cuCtxSetCurrent(previous_);
}

}  // namespace strobe::host
