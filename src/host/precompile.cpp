#include "host/precompile.h"

#include <cmath>
#include <cstdlib>
#include <sstream>

#include "host/cache.h"
#include "host/cuda_engine.h"
#include "host/device.h"
#include "host/jit.h"
#include "host/plan_backward.h"
#include "host/plan_forward.h"
#include "host/problem.h"

namespace strobe::host {
namespace {

// What a line may say, with what it means when it does not.
struct CallText {
  std::string pass = "forward", dtype = "bf16", backend = "auto";
  double batch = 2, seqlen_q = -1, seqlen_k = 4096, num_heads = 16, num_heads_k = -1, num_heads_v = -1;
  double head_dim = 128, head_dim_v = -1;
  double packed = 0, page_size = 0, seqlen_new = 0, rotary_dim = 0;
  double causal = 0, window_left = -1, window_right = -1, keep_first = 0;
  double softcap = 0, alibi = 0, dropout = 0, s_aux = 0, deterministic = 0;
};

struct NumberField {
  const char* name;
  double CallText::* field;
};
constexpr NumberField kNumbers[] = {
    {"batch", &CallText::batch},
    {"seqlen_q", &CallText::seqlen_q},
    {"seqlen_k", &CallText::seqlen_k},
    {"num_heads", &CallText::num_heads},
    {"num_heads_k", &CallText::num_heads_k},
    {"num_heads_v", &CallText::num_heads_v},
    {"head_dim", &CallText::head_dim},
    {"head_dim_v", &CallText::head_dim_v},
    {"packed", &CallText::packed},
    {"page_size", &CallText::page_size},
    {"seqlen_new", &CallText::seqlen_new},
    {"rotary_dim", &CallText::rotary_dim},
    {"causal", &CallText::causal},
    {"window_left", &CallText::window_left},
    {"window_right", &CallText::window_right},
    {"keep_first", &CallText::keep_first},
    {"softcap", &CallText::softcap},
    {"alibi", &CallText::alibi},
    {"dropout", &CallText::dropout},
    {"s_aux", &CallText::s_aux},
    {"deterministic", &CallText::deterministic},
};

[[noreturn]] void refuse(const std::string& word, const std::string& allowed) {
  throw Error(STROBE_INVALID_VALUE, "'" + word + "' in the call, allowed is " + allowed);
}

CallText parse(const std::string& line) {
  CallText call;
  std::istringstream words(line);
  for (std::string word; words >> word;) {
    const size_t equals = word.find('=');
    const std::string name = word.substr(0, equals), value = equals == std::string::npos ? "" : word.substr(equals + 1);
    if (name == "pass" && (value == "forward" || value == "backward" || value == "decode")) {
      call.pass = value;
    } else if (name == "dtype" && (value == "bf16" || value == "f16")) {
      call.dtype = value;
    } else if (name == "backend" && (value == "auto" || value == "sm80" || value == "sm90")) {
      call.backend = value;
    } else {
      std::string names =
          "pass=forward|backward|decode, dtype=bf16|f16, backend=auto|sm80|sm90, or a number for one of";
      const NumberField* known = nullptr;
      for (const NumberField& field : kNumbers) {
        names += std::string(" ") + field.name;
        if (name == field.name) known = &field;
      }
      char* end = nullptr;
      const double number = std::strtod(value.c_str(), &end);
      if (!known || value.empty() || *end || !std::isfinite(number)) refuse(word, names);
      call.*known->field = number;
    }
  }
  if (call.seqlen_q < 0) call.seqlen_q = call.pass == "decode" ? 1 : call.seqlen_k;
  if (call.num_heads_k < 0) call.num_heads_k = call.num_heads;
  if (call.num_heads_v < 0) call.num_heads_v = call.num_heads_k;
  if (call.head_dim_v < 0) call.head_dim_v = call.head_dim;
  for (double size : {call.batch, call.num_heads, call.num_heads_k, call.num_heads_v, call.head_dim, call.head_dim_v}) {
    if (size < 1) refuse(line, "a batch, numbers of heads and head_dims of at least 1");
  }
  return call;
}

// Plans look at whether a pointer is there, never behind it.
template <class T>
T* somewhere() {
  return reinterpret_cast<T*>(uintptr_t{4096});
}

Rows rows(i64 length, i64 heads, i64 dim) { return {somewhere<void>(), length * heads * dim, heads * dim, dim}; }

AttnParams attn_params(const CallText& c) {
  AttnParams p;
  p.dtype = c.dtype == "bf16" ? DType::bf16 : DType::f16;
  p.engine = c.backend == "sm80" ? Engine::sm80 : c.backend == "sm90" ? Engine::sm90 : Engine::any;
  p.batch = static_cast<i64>(c.batch);
  p.num_heads = static_cast<i64>(c.num_heads);
  p.num_heads_k = static_cast<i64>(c.num_heads_k);
  p.num_heads_v = static_cast<i64>(c.num_heads_v);
  p.head_dim = static_cast<i64>(c.head_dim);
  p.head_dim_v = static_cast<i64>(c.head_dim_v);
  p.seqlen_q = static_cast<i64>(c.seqlen_q);
  p.seqlen_k = static_cast<i64>(c.seqlen_k);
  p.total_q = p.batch * p.seqlen_q;
  p.q = rows(p.seqlen_q, p.num_heads, p.head_dim);
  p.k = rows(p.seqlen_k, p.num_heads_k, p.head_dim);
  p.v = rows(p.seqlen_k, p.num_heads_v, p.head_dim_v);
  p.out = rows(p.seqlen_q, p.num_heads, p.head_dim_v);
  p.lse = somewhere<float>();
  p.lse_head_stride = p.seqlen_q;
  p.lse_batch_stride = p.num_heads * p.seqlen_q;
  if (c.packed != 0) {
    p.cu_seqlens_q = p.cu_seqlens_k = somewhere<i32>();
    p.total_k = p.batch * p.seqlen_k;
    p.q.batch_stride = p.k.batch_stride = p.v.batch_stride = p.out.batch_stride = p.lse_batch_stride = 0;
    p.lse_head_stride = p.total_q;
  }
  if (c.page_size > 0) {
    p.page_size = static_cast<i64>(c.page_size);
    p.max_pages = p.page_table_stride = ceil_div(p.seqlen_k, p.page_size);
    p.num_pages = p.batch * p.max_pages;
    p.seqlen_k = p.max_pages * p.page_size;
    p.page_table = p.seqused_k = somewhere<i32>();
    p.k = rows(p.page_size, p.num_heads_k, p.head_dim);
    p.v = rows(p.page_size, p.num_heads_v, p.head_dim_v);
  }
  if (c.pass == "decode") p.seqused_k = somewhere<i32>();
  p.cache_rows = p.batch;
  p.causal = c.causal != 0;
  p.window_left = static_cast<i64>(c.window_left);
  p.window_right = p.causal ? 0 : static_cast<i64>(c.window_right);
  p.keep_first = static_cast<i64>(c.keep_first);
  p.scale = 1.f / std::sqrt(static_cast<float>(p.head_dim));
  p.softcap = static_cast<float>(c.softcap);
  p.dropout_p = static_cast<float>(c.dropout);
  if (c.alibi != 0) p.alibi_slopes = somewhere<float>();
  if (c.s_aux != 0) p.s_aux = somewhere<float>();
  return p;
}

}  // namespace

Plan plan_of(const std::string& line, const DeviceInfo& device) {
  const CallText c = parse(line);
  const AttnParams p = attn_params(c);
  if (c.pass == "backward") {
    BackwardParams b;
    b.fwd = p;
    b.dout = p.out;
    b.dq = p.q;
    b.dk = p.k;
    b.dv = p.v;
    b.ds_aux = p.s_aux ? somewhere<float>() : nullptr;
    b.deterministic = c.deterministic != 0;
    return plan_backward(b, device);
  }
  if (c.pass == "forward") return cuda::plan(p, device);
  KVCacheParams k;
  k.fwd = p;
  if (c.seqlen_new > 0) {
    k.fwd.seqlen_new = static_cast<i64>(c.seqlen_new);
    k.k_new = rows(k.fwd.seqlen_new, p.num_heads_k, p.head_dim);
    k.v_new = rows(k.fwd.seqlen_new, p.num_heads_v, p.head_dim_v);
  }
  if (c.rotary_dim > 0) {
    k.rotary_cos = k.rotary_sin = somewhere<void>();
    k.rotary_dim = static_cast<i64>(c.rotary_dim);
    k.seqlen_ro = p.seqlen_k;
  }
  return cuda::plan(k, device);
}

std::string explain_call(const std::string& call, int arch) {
  return cuda::explain(plan_of(call, typical_device(arch)));
}

void precompile(const std::string& call, int arch, const std::string& folder, strobe_kernel_visitor visit,
                void* context) {
  const Plan plan = plan_of(call, typical_device(arch));
  for (int i = 0; i < plan.count; ++i) {
    const Launch& launch = plan.launches[i];
    const std::string key = identity(launch.kernel, arch), name = describe(launch.kernel);
    const std::string path = folder.empty() ? "" : cache_path(folder, key);
    strobe_kernel kernel{};
    kernel.name = name.c_str();
    kernel.file = path.empty() ? nullptr : path.c_str();
    kernel.arch = arch;
    CompileReport report;
    Cubin cubin;
    kernel.cached = !path.empty() && read_cache(path, key, INT32_MAX, cubin);
    if (!kernel.cached) {
      cubin = compile(launch.kernel, arch, &report);
      if (!path.empty() && !write_cache(path, key, cubin)) {
        throw Error(STROBE_INTERNAL, path + " cannot be written");
      }
      kernel.registers = report.registers;
      kernel.stack_bytes = report.stack_bytes;
      kernel.spill_bytes = report.spill_stores + report.spill_loads;
      kernel.smem_bytes = static_cast<int32_t>(launch.smem);
      kernel.seconds = report.seconds;
      kernel.log = report.log.c_str();
    }
    if (visit) visit(context, &kernel);
  }
}

}  // namespace strobe::host
