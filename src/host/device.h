// GPUs by ordinal: their facts, and their primary contexts, which PyTorch and the CUDA runtime use too.
#pragma once

#include "host/driver.h"
#include "host/plan.h"

namespace strobe::host {

struct Device {
  int ordinal;
  CUcontext context;
  DeviceInfo info;
};

// Looked up once per device; no lock afterwards. Throws Error where there is no such device, or one below sm_80.
const Device& device(int ordinal);

// The usual device of an architecture: what Configs are planned for where there is no GPU. Throws for unknown ones.
DeviceInfo typical_device(int arch);

// The device's context is current on this thread while this lives.
class CurrentDevice {
 public:
  explicit CurrentDevice(const Device& device);
  ~CurrentDevice();
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;

 private:
  CUcontext previous_ = nullptr;
  bool changed_ = false;
};

}  // namespace strobe::host
