// Plans of many calls on every architecture, without a GPU: what is launched fits the device, the workspace holds what
// the parameter blocks point to, and shapes choose the kernels that they should.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <set>
#include <string>
#include <vector>

#include "host/cuda_engine.h"
#include "host/device.h"
#include "host/jit.h"
#include "host/plan_backward.h"
#include "host/plan_forward.h"
#include "host/precompile.h"
#include "host/problem.h"
#include "host/sources.h"

namespace {

using namespace strobe::host;
using strobe::AttnParams;
using strobe::BackwardParams;
using strobe::i32;
using strobe::i64;
using strobe::u32;

constexpr int kArchs[] = {80, 86, 87, 89, 90, 100, 120};

long passed = 0, failed = 0;

void expect(bool held, const char* what, const std::string& call, int arch) {
  held ? ++passed : ++failed;
  if (!held && failed < 20) std::printf("FAILED %s: %s on sm_%d\n", what, call.c_str(), arch);
}

// A kernel's words: "fwd_sm80", and the value of one of its Config's fields.
std::string kernel_name(const Launch& launch) {
  const std::string text = describe(launch.kernel);
  return text.substr(0, text.find('{'));
}

int field(const Launch& launch, const std::string& name) {
  const std::string text = describe(launch.kernel);
  for (const char* before : {"{", ", "}) {
    const size_t at = text.find(before + name + "=");
    if (at != std::string::npos) return std::stoi(text.substr(text.find('=', at) + 1));
  }
  return -1;
}

const Launch* find(const Plan& plan, const std::string& kernel) {
  for (int i = 0; i < plan.count; ++i) {
    if (kernel_name(plan.launches[i]) == kernel) return &plan.launches[i];
  }
  return nullptr;
}

bool embedded(const char* header) {
  for (int i = 0; i < kEmbeddedSourceCount; ++i) {
    if (std::string(kEmbeddedSources[i].name) == header) return true;
  }
  return false;
}

// What holds for every plan.
void check_plan(const Plan& plan, const DeviceInfo& device, const std::string& call) {
  const auto check = [&](bool held, const char* what) { expect(held, what, call, device.arch); };
  check(plan.count >= 1 && plan.count <= kMaxLaunches, "number of launches");
  check(plan.workspace_bytes >= 0 && plan.workspace_bytes % kWorkspaceAlign == 0, "workspace");
  check(plan.num_splits >= 1, "number of splits");
  for (int i = 0; i < plan.count; ++i) {
    const Launch& l = plan.launches[i];
    check(l.threads >= 32 && l.threads <= 1024 && l.threads % 32 == 0, "threads");
    check(static_cast<i64>(l.smem) <= device.smem_per_block, "shared memory");
    check(l.grid[0] >= 1 && l.grid[0] <= 0x7fffffffu, "first dimension of the grid");
    check(l.grid[1] >= 1 && l.grid[1] <= 65535 && l.grid[2] >= 1 && l.grid[2] <= 65535, "other dimensions of the grid");
    check(embedded(l.kernel.source->header), "the kernel's file is embedded");
    check(field(l, "dtype") == static_cast<int>(strobe::DType::bf16), "dtype");
  }
}

std::vector<std::string> calls() {
  std::vector<std::string> list;
  for (const char* dims : {"head_dim=8", "head_dim=40", "head_dim=64", "head_dim=64 head_dim_v=128", "head_dim=128",
                           "head_dim=192 head_dim_v=128", "head_dim=32 head_dim_v=256", "head_dim=256"}) {
    for (const char* lengths : {"seqlen_q=1 seqlen_k=1", "seqlen_q=1 seqlen_k=100000", "seqlen_q=70 seqlen_k=33",
                                "seqlen_q=4096 seqlen_k=4096", "seqlen_q=3 seqlen_k=0"}) {
      for (const char* heads :
           {"num_heads=1", "num_heads=32 num_heads_k=8", "num_heads=12 num_heads_k=4 num_heads_v=6"}) {
        for (const char* rest : {"", "causal=1 packed=1", "window_left=100 window_right=0 keep_first=4", "softcap=30",
                                 "alibi=1 s_aux=1", "dropout=0.1", "batch=300"}) {
          const std::string words = std::string(dims) + " " + lengths + " " + heads + " " + rest;
          list.push_back("pass=forward " + words);
          list.push_back("pass=backward " + words);
          list.push_back("pass=backward deterministic=1 " + words);
          if (words.find("packed") == std::string::npos && words.find("dropout") == std::string::npos) {
            list.push_back("pass=decode page_size=16 seqlen_new=1 rotary_dim=8 " + words);
          }
        }
      }
    }
  }
  return list;
}

void test_every_call() {
  for (int arch : kArchs) {
    const DeviceInfo device = typical_device(arch);
    for (const std::string& call : calls()) {
      try {
        const Plan plan = plan_of(call, device), again = plan_of(call, device);
        check_plan(plan, device, call);
        expect(plan.count == again.count && plan.workspace_bytes == again.workspace_bytes &&
                   plan.launches[0].kernel == again.launches[0].kernel,
               "the same plan twice", call, arch);
      } catch (const strobe::Error& error) {
        expect(false, error.what(), call, arch);
      }
    }
  }
}

void test_choices() {
  const DeviceInfo h100 = typical_device(90), rtx = typical_device(89);
  const auto holds = [](bool held, const char* what) { expect(held, what, "as named", 90); };

  const Plan dense = plan_of("pass=forward backend=sm80 head_dim=128 seqlen_k=8192 batch=4 causal=1", h100);
  holds(dense.count == 1 && dense.workspace_bytes == 0, "a dense forward is one kernel and no workspace");
  holds(field(dense.launches[0], "split") == 0 && field(dense.launches[0], "paged") == 0,
        "and neither split nor paged");

  const std::string decode =
      "pass=decode backend=sm80 head_dim=128 num_heads=32 num_heads_k=8 batch=1 seqlen_k=32768 page_size=16";
  const Plan split = plan_of(decode, h100);
  const Launch *forward = find(split, "fwd_sm80"), *combine = find(split, "combine");
  holds(forward && combine && split.num_splits > 1, "decoding one long sequence is split");
  if (forward && combine) {
    holds(field(*forward, "split") == 1 && field(*forward, "pack") == 1 && field(*forward, "paged") == 1, "its Config");
    holds(split.workspace_bytes >= i64{split.num_splits} * 32 * (128 + 2) * 4, "room for the partial results");
    holds(forward->grid[0] >= static_cast<u32>(h100.sm_count) / 2, "most processors have work");
  }
  const Plan window = plan_of(decode + " window_left=1000 keep_first=4 causal=1", h100);
  holds(window.num_splits < split.num_splits, "a window has fewer tiles to split");
  const Plan many = plan_of("pass=decode head_dim=128 num_heads=32 num_heads_k=8 batch=512 seqlen_k=4096", h100);
  holds(many.num_splits == 1 && many.count == 1, "many sequences are not split");

  const Plan append = plan_of(decode + " seqlen_new=1 rotary_dim=64", h100);
  holds(kernel_name(append.launches[0]) == "append_kv", "keys are appended before they are read");

  const std::string gradients = "pass=backward head_dim=128 seqlen_k=2048 num_heads=16 causal=1";
  const Plan backward = plan_of(gradients, h100), fixed = plan_of(gradients + " deterministic=1", h100);
  const Launch *main = find(backward, "bwd_sm80"), *ordered = find(fixed, "bwd_sm80");
  holds(main && ordered && field(*main, "deterministic") == 0 && field(*ordered, "deterministic") == 1,
        "deterministic gradients are other instructions");
  holds(fixed.workspace_bytes > backward.workspace_bytes, "and need room for the turns");

  const std::string windowed =
      "pass=backward head_dim=128 seqlen_k=10000 num_heads=32 num_heads_k=4 batch=1 causal=1 window_left=1000 ";
  const Plan few = plan_of(windowed + "keep_first=4", h100), many_kept = plan_of(windowed + "keep_first=64", h100);
  holds(find(few, "bwd_kept") && find(few, "bwd_kept_sum") && !find(few, "bwd_pre"),
        "few kept tokens ahead of a window have kernels of their own");
  holds(find(many_kept, "bwd_pre") && !find(many_kept, "bwd_kept"), "many do not");
  const Launch *whole = find(few, "bwd_sm80"), *sum = find(few, "bwd_sum");
  holds(whole && sum && whole->grid[0] % 8 == 0 && whole->grid[0] < 79 * 32 / 2 && sum->grid[0] < 79 * 8,
        "only the last blocks of keys of a window are divided among heads");

  const Plan small = plan_of("pass=forward head_dim=128", rtx);
  holds(small.launches[0].smem <= 99 * 1024, "99 KB where there is no more");
}

void test_refusals() {
  const auto text_of = [](const std::string& call, int arch) -> std::string {
    try {
      plan_of(call, typical_device(arch));
    } catch (const strobe::Error& error) {
      return error.what();
    }
    return "";
  };
  const auto says = [&](const std::string& call, int arch, const char* text) {
    expect(text_of(call, arch).find(text) != std::string::npos, text, call + " gives '" + text_of(call, arch) + "'",
           arch);
  };
  says("pass=forward head_dim=128 head_dim_v=264", 90, "the nearest that fit are 128 and 256");
  says("pass=forward head_dim=600 head_dim_v=512", 90, "the nearest that fit are 576 and 512");
  says("pass=backward head_dim=264", 90, "no kernel for gradients fits head_dim 264");
  says("pass=forward head_dim=128", 75, "architecture is 75, allowed is one of 80, 86");
  says("pass=sideways", 90, "'pass=sideways' in the call, allowed is pass=forward|backward|decode");
  says("head_dim=12x", 90, "'head_dim=12x' in the call");
  says("head_dimension=128", 90, "'head_dimension=128' in the call");
  says("head_dim=0", 90, "head_dims of at least 1");
}

// Workspace offsets reach the kernels: every pointer of a block lies inside the workspace, none behind its end.
void test_parameter_blocks() {
  strobe::AttnParams p;
  p.dtype = strobe::DType::bf16;
  p.batch = 1, p.num_heads = 32, p.num_heads_k = p.num_heads_v = 8, p.head_dim = p.head_dim_v = 128;
  p.seqlen_q = p.total_q = 1, p.seqlen_k = 32768;
  const Plan plan = plan_forward(p, typical_device(90));
  alignas(256) static char start[256];
  LaunchParams blocks;
  fill_forward(p, plan, start, blocks);
  const auto* forward = reinterpret_cast<const strobe::FwdLaunch*>(blocks.blocks[0]);
  const auto* combine = reinterpret_cast<const strobe::CombineLaunch*>(blocks.blocks[1]);
  const auto inside = [&](const void* at, i64 bytes) {
    const i64 offset = static_cast<const char*>(at) - start;
    return offset >= 0 && offset % 16 == 0 && offset + bytes <= plan.workspace_bytes;
  };
  const i64 rows = i64{plan.num_splits} * 32;
  const auto holds = [](bool held, const char* what) { expect(held, what, "one long sequence", 90); };
  holds(plan.count == 2 && plan.num_splits > 1, "two kernels");
  holds(inside(forward->partial_out, rows * 128 * 4) && inside(forward->partial_state, rows * 2 * 4),
        "partial results");
  holds(combine->partial_out == forward->partial_out && combine->partial_state == forward->partial_state,
        "both kernels mean the same partial results");
  holds(forward->splits.divisor == strobe::u32(plan.num_splits) && combine->num_splits == plan.num_splits,
        "number of splits");
}

// Every kernel that is launched finds its parameters, also where nothing needs memory: without rows the workspace is
// empty, and what would lie in it has no address.
void check_parameters(const BackwardParams& b) {
  const Plan plan = plan_backward(b, typical_device(90));
  alignas(256) static char start[256];
  LaunchParams blocks;
  std::memset(blocks.blocks, 0xab, sizeof blocks.blocks);
  fill_backward(b, plan, plan.workspace_bytes ? start : nullptr, blocks);
  for (int i = 0; i < plan.count; ++i) {
    const bool written = std::any_of(blocks.blocks[i], blocks.blocks[i] + 16, [](int byte) { return byte != 0xab; });
    expect(written, "a kernel without parameters",
           describe(plan.launches[i].kernel) + " of " + std::to_string(b.fwd.seqlen_q) + " rows, " +
               std::to_string(b.fwd.seqlen_k) + " keys",
           90);
  }
}

void test_gradients_of_few_rows() {
  BackwardParams b;
  AttnParams& p = b.fwd;
  p.dtype = strobe::DType::bf16;
  p.batch = 3, p.num_heads = 6, p.head_dim = 64, p.head_dim_v = 128, p.scale = 1.f, p.causal = true;
  for (i64 kept : {0, 4}) {
    p.window_left = kept ? 20 : -1, p.keep_first = kept;
    for (i64 seqlen_q : {0, 1, 200}) {
      p.seqlen_q = seqlen_q, p.total_q = p.batch * seqlen_q;
      for (i64 heads_k : {1, 2, 6})
        for (i64 heads_v : {1, 3, 6})
          for (i64 seqlen_k : {0, 1, 300}) {
            p.num_heads_k = heads_k, p.num_heads_v = heads_v, p.seqlen_k = seqlen_k;
            check_parameters(b);
          }
    }
  }
}

}  // namespace

int main() {
  test_gradients_of_few_rows();
  test_every_call();
  test_choices();
  test_refusals();
  test_parameter_blocks();
  std::printf("%ld passed, %ld failed\n", passed, failed);
  return failed != 0;
}
