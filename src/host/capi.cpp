// The C ABI: checks, engine, and every exception turned into a status and this thread's text.
#include <exception>
#include <new>
#include <string>

#include "cpu/cpu.h"
#include "host/cuda_engine.h"
#include "host/executor.h"
#include "host/precompile.h"
#include "host/problem.h"
#include "strobe/strobe.h"

namespace {

thread_local std::string last_error;

// Nothing may be thrown from here on, even where memory for the text is what is missing.
int32_t fail(strobe_status status, const char* function, const char* text) noexcept {
  try {
    last_error = function ? std::string(function) + ": " + text : text;
  } catch (...) {
    last_error.clear();
  }
  return status;
}

template <class Body>
int32_t guarded(const char* function, Body body) noexcept {
  last_error.clear();
  try {
    body();
    return STROBE_OK;
  } catch (const strobe::Error& error) {
    return fail(error.status, nullptr, error.what());
  } catch (const std::bad_alloc&) {
    return fail(STROBE_INTERNAL, function, "out of memory");
  } catch (const std::exception& error) {
    return fail(STROBE_INTERNAL, function, error.what());
  } catch (...) {
    return fail(STROBE_INTERNAL, function, "unknown failure");
  }
}

template <class Args>
void require(const Args* args, const char* function) {
  if (!args) throw strobe::Error(STROBE_INVALID_VALUE, std::string(function) + ": args is null, allowed is a struct");
}

void require_out(const strobe_args& args, const char* function) {
  if (args.out) return;
  throw strobe::Error(STROBE_INVALID_VALUE,
                      std::string(args.function ? args.function : function) + ": out is missing, allowed is a tensor");
}

const strobe_executor& executor_of(const strobe_args& args) {
  return args.executor ? *args.executor : strobe::default_executor();
}

std::string line_of(const char* call) {
  if (!call) throw strobe::Error(STROBE_INVALID_VALUE, "call is null, allowed is a line of text");
  return call;
}

bool on_gpu(const strobe_args& args) { return args.q->device == STROBE_CUDA; }

template <class Params>
void run_on_gpu(const Params& params, const strobe_args& args, const char* function) {
  strobe::cuda::named(args.function ? args.function : function, [&] {
    const strobe::host::Device& gpu = strobe::host::device(args.q->device_index);
    const strobe::host::Plan plan = strobe::cuda::plan(params, gpu);
    if (plan.workspace_bytes > static_cast<strobe::i64>(args.workspace_bytes)) {
      throw strobe::Error(STROBE_INVALID_VALUE, "workspace_bytes is " + std::to_string(args.workspace_bytes) +
                                                    ", allowed is at least " + std::to_string(plan.workspace_bytes));
    }
    strobe::cuda::run(params, plan, gpu, args.workspace, args.stream);
  });
}

template <class Params>
size_t workspace_of(const Params& params, const strobe_args& args, const char* function) {
  if (!on_gpu(args)) return 0;
  return strobe::cuda::named(args.function ? args.function : function, [&] {
    const strobe::host::Device& gpu = strobe::host::device(args.q->device_index);
    return static_cast<size_t>(strobe::cuda::plan(params, gpu).workspace_bytes);
  });
}

}  // namespace

void strobe_args_init(strobe_args* args) {
  *args = strobe_args{};
  args->struct_size = sizeof *args;
  args->max_seqlen_q = args->max_seqlen_k = -1;
  args->window_left = args->window_right = -1;
}

void strobe_backward_args_init(strobe_backward_args* args) {
  *args = strobe_backward_args{};
  args->struct_size = sizeof *args;
  strobe_args_init(&args->fwd);
}

void strobe_kvcache_args_init(strobe_kvcache_args* args) {
  *args = strobe_kvcache_args{};
  args->struct_size = sizeof *args;
  strobe_args_init(&args->fwd);
  args->rotary_interleaved = 1;
}

int32_t strobe_forward(const strobe_args* args) {
  return guarded("strobe_forward", [&] {
    require(args, "strobe_forward");
    strobe::ForwardProblem problem;
    strobe::check_forward(*args, problem);
    require_out(*args, "strobe_forward");
    if (on_gpu(*args)) return run_on_gpu(problem.params, *args, "strobe_forward");
    strobe::cpu::forward(problem.params, executor_of(*args));
  });
}

int32_t strobe_backward(const strobe_backward_args* args) {
  return guarded("strobe_backward", [&] {
    require(args, "strobe_backward");
    strobe::BackwardProblem problem;
    strobe::check_backward(*args, problem);
    if (on_gpu(args->fwd)) return run_on_gpu(problem.params, args->fwd, "strobe_backward");
    strobe::cpu::backward(problem.params, executor_of(args->fwd));
  });
}

int32_t strobe_kvcache(const strobe_kvcache_args* args) {
  return guarded("strobe_kvcache", [&] {
    require(args, "strobe_kvcache");
    strobe::KVCacheProblem problem;
    strobe::check_kvcache(*args, problem);
    require_out(args->fwd, "strobe_kvcache");
    if (on_gpu(args->fwd)) return run_on_gpu(problem.params, args->fwd, "strobe_kvcache");
    strobe::cpu::kvcache(problem.params, executor_of(args->fwd));
  });
}

int32_t strobe_forward_workspace(const strobe_args* args, size_t* bytes) {
  return guarded("strobe_forward_workspace", [&] {
    require(args, "strobe_forward_workspace");
    strobe::ForwardProblem problem;
    strobe::check_forward(*args, problem);
    *bytes = workspace_of(problem.params, *args, "strobe_forward_workspace");
  });
}

int32_t strobe_backward_workspace(const strobe_backward_args* args, size_t* bytes) {
  return guarded("strobe_backward_workspace", [&] {
    require(args, "strobe_backward_workspace");
    strobe::BackwardProblem problem;
    strobe::check_backward(*args, problem);
    *bytes = workspace_of(problem.params, args->fwd, "strobe_backward_workspace");
  });
}

int32_t strobe_kvcache_workspace(const strobe_kvcache_args* args, size_t* bytes) {
  return guarded("strobe_kvcache_workspace", [&] {
    require(args, "strobe_kvcache_workspace");
    strobe::KVCacheProblem problem;
    strobe::check_kvcache(*args, problem);
    *bytes = workspace_of(problem.params, args->fwd, "strobe_kvcache_workspace");
  });
}

int32_t strobe_compile(const char* call, int32_t arch, const char* folder, strobe_kernel_visitor visit, void* context) {
  return guarded("strobe_compile", [&] {
    strobe::cuda::named("strobe_compile",
                        [&] { strobe::host::precompile(line_of(call), arch, folder ? folder : "", visit, context); });
  });
}

int32_t strobe_explain(const char* call, int32_t arch, char* text, size_t size) {
  return guarded("strobe_explain", [&] {
    strobe::cuda::named("strobe_explain", [&] {
      if (!text || size == 0) throw strobe::Error(STROBE_INVALID_VALUE, "text is null or has no room");
      const std::string all = strobe::host::explain_call(line_of(call), arch);
      text[all.copy(text, size - 1)] = '\0';
    });
  });
}

const char* strobe_last_error(void) { return last_error.c_str(); }
const char* strobe_version(void) { return STROBE_VERSION; }
const char* strobe_cpu_isa(void) { return strobe::cpu::isa_name(); }
