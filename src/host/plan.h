// What a call runs: kernels with their Configs, grids and the workspace that the caller allocates. A Plan is a pure
// function of (parameters, DeviceInfo): no CUDA call, no allocation, so that it is tested on any machine.
//
//   void add_forward(Plan&, const AttnParams&, const DeviceInfo&);                                  plan_forward.h
//   void fill_forward(const AttnParams&, const Plan&, void* workspace, LaunchParams&);
//   void add_forward_sm90(Plan&, const AttnParams&, const DeviceInfo&);                             plan_sm90.h
//   void add_append(Plan&, const KVCacheParams&);                                                   plan_append.h
//   Plan plan_backward(const BackwardParams&, const DeviceInfo&);                                   plan_backward.h
//   void fill_backward(const BackwardParams&, const Plan&, void* workspace, LaunchParams&);
//
// They throw Error(STROBE_UNSUPPORTED) where no Config fits. Parameters may hold device pointers: nothing behind a
// pointer is read. Launches run in order; a grid with a 0 in it is left out.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>
#include <type_traits>

#include "core/params.h"

namespace strobe::host {

constexpr int kMaxLaunches = 8;
constexpr int kMaxConfigFields = 24;
constexpr int kMaxParamBytes = 2048;
// Everything that shares the workspace starts at a multiple of this.
constexpr i64 kWorkspaceAlign = 256;

// Facts of a device that plans depend on.
struct DeviceInfo {
  int arch = 0;  // 80, 86, 89, 90, 120: 10 * major + minor
  int sm_count = 0;
  i64 smem_per_block = 0;  // opt-in maximum of one block
  i64 smem_per_sm = 0;
  i64 l2_bytes = 0;
};

// A kernel template: where it is written, and what one of its Configs is called. Defined once, constexpr, at namespace
// scope: a KernelRef holds its address.
struct KernelTemplate {
  const char* header;  // under src/: "cuda/fwd_sm80.cuh"
  const char* name;    // "strobe::fwd_sm80"
  const char* config;  // "strobe::FwdConfig"
  // Calls visit(context, field, value) for each field of a default Config: the only source of field names.
  void (*each_field)(void* context, void (*visit)(void* context, const char* field, i32 value));
};

// One kernel: a template and its Config's fields in order. Compared and hashed as integers.
struct KernelRef {
  const KernelTemplate* source = nullptr;
  int count = 0;
  i32 values[kMaxConfigFields] = {};

  bool operator==(const KernelRef& other) const {
    return source == other.source && count == other.count &&
           std::memcmp(values, other.values, sizeof(i32) * static_cast<size_t>(count)) == 0;
  }
};

// Use: inline constexpr KernelTemplate kFwdSm80 = kernel_template<FwdConfig>("cuda/fwd_sm80.cuh", "strobe::fwd_sm80",
// "strobe::FwdConfig"); then kernel_ref(kFwdSm80, config).
template <class Config>
constexpr KernelTemplate kernel_template(const char* header, const char* name, const char* config) {
  return {header, name, config, [](void* context, void (*visit)(void*, const char*, i32)) {
            fields(Config{}, [&](const char* field, i32 value) { visit(context, field, value); });
          }};
}

template <class Config>
constexpr int field_count() {
  int count = 0;
  fields(Config{}, [&](const char*, i32) { ++count; });
  return count;
}

template <class Config>
KernelRef kernel_ref(const KernelTemplate& source, const Config& config) {
  static_assert(sizeof(Config) <= sizeof(i32) * kMaxConfigFields);
  static_assert(field_count<Config>() == int(sizeof(Config) / sizeof(i32)));  // every field is there
  KernelRef ref;
  ref.source = &source;
  fields(config, [&](const char*, i32 value) { ref.values[ref.count++] = value; });
  return ref;
}

// The Config that a kernel_ref was made of.
template <class Config>
Config config_of(const KernelRef& ref) {
  static_assert(std::is_trivially_copyable_v<Config>);
  Config config;
  std::memcpy(&config, ref.values, sizeof config);
  return config;
}

struct Launch {
  KernelRef kernel;
  u32 grid[3] = {1, 1, 1};
  u32 threads = 0;
  u32 smem = 0;           // dynamic shared memory, bytes
  u32 cluster = 1;        // blocks of a cluster, which divides grid[0]
  bool overlaps = false;  // may start before the launch ahead of it has ended: its kernel waits for that itself
};

struct Plan {
  Launch launches[kMaxLaunches];
  int count = 0;
  i64 workspace_bytes = 0;
  i64 zero_bytes = 0;  // of the workspace, which are 0 before the first launch (LaunchParams::zero)
  // What the parameter builders need again. Offsets count bytes from the workspace's start.
  int num_splits = 1;
  const char* why = nullptr;  // this engine was chosen, for explain(); words that follow "because"
  i64 offsets[kMaxLaunches] = {};
  i64 values[kMaxLaunches] = {};

  Launch& add() { return launches[count++]; }
  // Reserves workspace; returns its offset.
  i64 reserve(i64 bytes) {
    const i64 at = workspace_bytes;
    workspace_bytes += (bytes + kWorkspaceAlign - 1) / kWorkspaceAlign * kWorkspaceAlign;
    return at;
  }
};

// A tensor of 16-bit elements as tensor copies see it, fastest dimension first; encoded where it is launched.
constexpr int kBoxRank = 4;
struct TensorBox {
  void* map;  // in a parameter block
  void* data;
  u64 dims[kBoxRank], strides[kBoxRank - 1];  // strides in bytes, of all dimensions but the first
  u32 box[kBoxRank];
  DType dtype;
};
constexpr int kMaxTensorBoxes = 4;

// The parameter block of each launch, in the order of the launches. Lives on the caller's stack.
struct LaunchParams {
  alignas(64) unsigned char blocks[kMaxLaunches][kMaxParamBytes];
  TensorBox boxes[kMaxTensorBoxes];
  int box_count = 0;
  void* zero = nullptr;  // Plan::zero_bytes from here on

  template <class Params>
  Params& emplace(int launch) {
    static_assert(sizeof(Params) <= kMaxParamBytes && alignof(Params) <= 64);
    static_assert(std::is_trivially_copyable_v<Params>);
    return *new (blocks[launch]) Params{};
  }
};

}  // namespace strobe::host
