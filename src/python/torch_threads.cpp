#include "python/torch_threads.h"

#include <dlfcn.h>

#include "host/executor.h"

namespace strobe::python {
namespace {

// PyTorch's stable C interface (torch/csrc/stable/c/shim.h, since 2.10).
using RangeFunction = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain, RangeFunction function, void* context);
using NumThreads = int32_t (*)(uint32_t* threads);

ParallelFor parallel_for = nullptr;
NumThreads get_num_threads = nullptr;

int32_t num_threads(void*) {
  uint32_t threads = 1;
  return get_num_threads(&threads) == 0 ? int32_t(threads) : 1;
}

void run(void*, int32_t n, strobe_task task, void* state) {
  struct Call {
    strobe_task task;
    void* state;
  } call{task, state};
  parallel_for(
      0, n, 1,
      [](int64_t begin, int64_t end, void* context) {
        const Call& c = *static_cast<Call*>(context);
        for (int64_t w = begin; w < end; ++w) c.task(c.state, int32_t(w));
      },
      &call);
}

}  // namespace

const strobe_executor* torch_executor() {
  static const strobe_executor executor{nullptr, num_threads, run};
  static const bool found = [] {
    void* torch = dlopen("libtorch_cpu.so", RTLD_NOLOAD | RTLD_LAZY);
    if (!torch) return false;
    parallel_for = reinterpret_cast<ParallelFor>(dlsym(torch, "torch_parallel_for"));
    get_num_threads = reinterpret_cast<NumThreads>(dlsym(torch, "torch_get_num_threads"));
    return parallel_for && get_num_threads;
  }();
  return found ? &executor : nullptr;
}

}  // namespace strobe::python
