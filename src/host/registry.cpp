#include "host/registry.h"

#include <atomic>
#include <cstdlib>
#include <exception>
#include <map>
#include <mutex>
#include <thread>

#include "host/cache.h"
#include "host/problem.h"

namespace strobe::host {
namespace {

// CUfunction_attribute
constexpr int kMaxDynamicSharedSizeBytes = 8;
// What a block may use without asking. Shared memory that a kernel declares itself counts, too, with the
// alignment of what follows it.
constexpr u32 kDefaultSmem = 48 * 1024, kDeclaredSmem = 4 * 1024;
constexpr int kRelaxedCapture = 2;

// Buckets of lists that only grow: readers take no lock.
struct Loaded {
  KernelRef kernel;
  int device;
  CUfunction function;
  const Loaded* next;
};
constexpr size_t kBuckets = 4096;
std::atomic<const Loaded*> buckets[kBuckets];
std::mutex loading;

size_t bucket_of(const KernelRef& kernel, int device) {
  u64 h = reinterpret_cast<u64>(kernel.source) + static_cast<u64>(device);
  for (int i = 0; i < kernel.count; ++i) h = (h ^ static_cast<u32>(kernel.values[i])) * 0x9e3779b97f4a7c15ull;
  return (h ^ h >> 32) % kBuckets;
}

CUfunction find_loaded(const KernelRef& kernel, int device) {
  const Loaded* node = buckets[bucket_of(kernel, device)].load(std::memory_order_acquire);
  for (; node; node = node->next) {
    if (node->device == device && node->kernel == kernel) return node->function;
  }
  return nullptr;
}

void refuse_capture(const KernelRef& kernel, CUstream stream) {
  int status = 0;
  // A stream that cannot be asked is part of somebody's capture, too.
  if (driver().cuStreamIsCapturing(stream, &status) == kCudaSuccess && status == 0) return;
  throw Error(STROBE_INVALID_VALUE, "the stream is being captured into a graph but " + describe(kernel) +
                                        " is not compiled and loaded yet: make one call with the same shapes and "
                                        "options before the capture (warm up)");
}

// Other threads may be capturing: loading is no part of their graphs.
class RelaxedCapture {
 public:
  RelaxedCapture() { driver().cuThreadExchangeStreamCaptureMode(&mode_); }
  ~RelaxedCapture() { driver().cuThreadExchangeStreamCaptureMode(&mode_); }

 private:
  int mode_ = kRelaxedCapture;
};

// A driver loads what a compiler of its own major version made, or of an older one.
int newest_loadable() { return driver().version / 1000 * 1000 + 999; }

CUfunction load_function(const Launch& launch, const Device& device) {
  const Driver& d = driver();
  const RelaxedCapture relaxed;
  const Cubin& cubin = cubin_of(launch.kernel, device.info.arch, newest_loadable());
  const std::string what = "load " + describe(launch.kernel);
  CUmodule module;
  check_cuda(d.cuModuleLoadData(&module, cubin.image.data()), what.c_str());
  CUfunction function;
  check_cuda(d.cuModuleGetFunction(&function, module, cubin.name.c_str()), what.c_str());
  if (launch.smem + kDeclaredSmem > kDefaultSmem) {
    check_cuda(d.cuFuncSetAttribute(function, kMaxDynamicSharedSizeBytes, static_cast<int>(launch.smem)),
               (what + " with " + std::to_string(launch.smem) + " bytes of shared memory").c_str());
  }
  return function;
}

bool jit_disabled() {
  const char* value = std::getenv("STROBE_DISABLE_JIT");
  return value && *value && std::string(value) != "0";
}

// Machine code in memory, one entry per identity. Entries stay: functions of other devices are loaded from them.
struct Entry {
  std::mutex compiling;
  bool ready = false;
  Cubin cubin;
};
std::mutex entries_mutex;

Entry& entry_of(const std::string& key) {
  static std::map<std::string, Entry>& entries = *new std::map<std::string, Entry>;
  const std::lock_guard lock(entries_mutex);
  return entries[key];
}

}  // namespace

const Cubin& cubin_of(const KernelRef& kernel, int arch, int newest) {
  const std::string key = identity(kernel, arch);
  Entry& entry = entry_of(key);
  // Threads that want the same kernel wait for one of them to make it.
  const std::lock_guard lock(entry.compiling);
  if (entry.ready) return entry.cubin;
  const std::string folder = cache_folder();
  const std::string path = folder.empty() ? "" : cache_path(folder, key);
  if (path.empty() || !read_cache(path, key, newest, entry.cubin)) {
    if (jit_disabled()) {
      throw Error(STROBE_UNSUPPORTED, "STROBE_DISABLE_JIT is set and " + describe(kernel) + " for " + target_of(arch) +
                                          " is not in " + (folder.empty() ? "a cache" : folder) +
                                          ": build it with `strobe compile`, or unset STROBE_DISABLE_JIT");
    }
    entry.cubin = compile(kernel, arch);
    if (!path.empty()) write_cache(path, key, entry.cubin);
  }
  entry.ready = true;
  return entry.cubin;
}

CUfunction function_of(const Launch& launch, const Device& device, CUstream stream) {
  if (const CUfunction known = find_loaded(launch.kernel, device.ordinal)) [[likely]]
    return known;
  refuse_capture(launch.kernel, stream);
  const CUfunction function = load_function(launch, device);
  const std::lock_guard lock(loading);
  if (const CUfunction known = find_loaded(launch.kernel, device.ordinal)) return known;
  std::atomic<const Loaded*>& bucket = buckets[bucket_of(launch.kernel, device.ordinal)];
  bucket.store(new Loaded{launch.kernel, device.ordinal, function, bucket.load(std::memory_order_relaxed)},
               std::memory_order_release);
  return function;
}

void load(const Plan& plan, const Device& device, CUstream stream, CUfunction* functions) {
  int cold = 0, last_cold = 0;
  for (int i = 0; i < plan.count; ++i) {
    functions[i] = find_loaded(plan.launches[i].kernel, device.ordinal);
    if (!functions[i]) {
      ++cold;
      last_cold = i;
    }
  }
  if (cold == 0) [[likely]]
    return;
  refuse_capture(plan.launches[last_cold].kernel, stream);
  if (cold == 1) {
    functions[last_cold] = function_of(plan.launches[last_cold], device, stream);
    return;
  }
  std::exception_ptr failures[kMaxLaunches];
  std::jthread threads[kMaxLaunches];
  for (int i = 0; i < plan.count; ++i) {
    if (functions[i]) continue;
    threads[i] = std::jthread([&, i] {
      try {
        cubin_of(plan.launches[i].kernel, device.info.arch, newest_loadable());
      } catch (...) {
        failures[i] = std::current_exception();
      }
    });
  }
  for (std::jthread& thread : threads) {
    if (thread.joinable()) thread.join();
  }
  for (const std::exception_ptr& failure : failures) {
    if (failure) std::rethrow_exception(failure);
  }
  for (int i = 0; i < plan.count; ++i) {
    if (!functions[i]) functions[i] = function_of(plan.launches[i], device, stream);
  }
}

}  // namespace strobe::host
