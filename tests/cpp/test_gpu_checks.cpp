// Checks of calls whose tensors are on a GPU, without a GPU: nothing behind a pointer is read, and what the kernels do
// not serve is refused. Every data pointer leads to memory that must not be touched.
#include <sys/mman.h>

#include <cstdio>
#include <functional>
#include <string>

#include "host/problem.h"

namespace {

using strobe::i64;

int passed = 0, failed = 0;
char* untouchable = nullptr;

void expect(bool held, const std::string& what) {
  held ? ++passed : ++failed;
  if (!held) std::printf("FAILED %s\n", what.c_str());
}

strobe_tensor tensor(int32_t dtype, std::initializer_list<int64_t> shape) {
  strobe_tensor t{};
  t.data = untouchable;
  untouchable += 1 << 20;  // no two tensors overlap
  t.dtype = dtype;
  t.device = STROBE_CUDA;
  for (int64_t size : shape) t.shape[t.ndim++] = size;
  int64_t stride = 1;
  for (int i = t.ndim - 1; i >= 0; --i) {
    t.stride[i] = stride;
    stride *= t.shape[i];
  }
  return t;
}

// A packed forward call, or one with a paged cache.
struct Example {
  strobe_tensor q = tensor(STROBE_BFLOAT16, {40, 8, 64}), k = tensor(STROBE_BFLOAT16, {50, 2, 64}),
                v = tensor(STROBE_BFLOAT16, {50, 2, 64}), out = tensor(STROBE_BFLOAT16, {40, 8, 64}),
                lse = tensor(STROBE_FLOAT32, {8, 40}), cu_q = tensor(STROBE_INT32, {4}),
                cu_k = tensor(STROBE_INT32, {4}), used = tensor(STROBE_INT32, {3}), pad = tensor(STROBE_INT32, {3}),
                full = tensor(STROBE_INT32, {3}), slopes = tensor(STROBE_FLOAT32, {8}),
                sinks = tensor(STROBE_FLOAT32, {8});
  strobe_tensor q1 = tensor(STROBE_BFLOAT16, {3, 1, 8, 64}), pages = tensor(STROBE_BFLOAT16, {9, 16, 2, 64}),
                pages_v = tensor(STROBE_BFLOAT16, {9, 16, 2, 64}), table = tensor(STROBE_INT32, {3, 5}),
                k_new = tensor(STROBE_BFLOAT16, {3, 1, 2, 64}), v_new = tensor(STROBE_BFLOAT16, {3, 1, 2, 64}),
                cos = tensor(STROBE_BFLOAT16, {99, 16}), sin = tensor(STROBE_BFLOAT16, {99, 16});
  strobe_args packed;
  strobe_kvcache_args decode;

  Example() {
    strobe_args_init(&packed);
    packed.q = &q, packed.k = &k, packed.v = &v, packed.out = &out, packed.lse = &lse;
    packed.cu_seqlens_q = &cu_q, packed.cu_seqlens_k = &cu_k;
    packed.seqused_q = packed.seqused_k = &used, packed.leftpad_k = &pad, packed.full_from = &full;
    packed.alibi_slopes = &slopes, packed.s_aux = &sinks;
    strobe_kvcache_args_init(&decode);
    decode.fwd.q = &q1, decode.fwd.k = &pages, decode.fwd.v = &pages_v;
    decode.fwd.page_table = &table, decode.fwd.seqused_k = &used, decode.fwd.leftpad_k = &pad;
    decode.k_new = &k_new, decode.v_new = &v_new, decode.rotary_cos = &cos, decode.rotary_sin = &sin;
  }
};

void test_accepted() {
  Example e;
  strobe::ForwardProblem forward;
  strobe::check_forward(e.packed, forward);
  expect(forward.params.batch == 3 && forward.params.total_q == 40 && forward.params.total_k == 50, "packed sizes");
  expect(forward.params.seqlen_q == 40 && forward.params.seqlen_k == 50, "lengths are bounded by the totals");
  expect(forward.params.cu_seqlens_q == e.cu_q.data && forward.params.s_aux == e.sinks.data, "pointers are passed on");
  e.packed.max_seqlen_q = 17, e.packed.max_seqlen_k = 99;
  strobe::check_forward(e.packed, forward);
  expect(forward.params.seqlen_q == 17 && forward.params.seqlen_k == 50, "and by the caller");

  strobe::KVCacheProblem decode;
  strobe::check_kvcache(e.decode, decode);
  expect(decode.params.fwd.seqlen_k == 80 && decode.params.fwd.num_pages == 9, "capacity of the pages");
  expect(decode.params.fwd.seqlen_new == 1 && decode.params.rotary_dim == 32, "what is appended");
}

void refused(const char* what, strobe_status status, const char* text, const std::function<void(Example&)>& change) {
  Example e;
  change(e);
  for (const bool decode : {false, true}) {
    try {
      if (decode) {
        strobe::KVCacheProblem problem;
        strobe::check_kvcache(e.decode, problem);
      } else {
        strobe::ForwardProblem problem;
        strobe::check_forward(e.packed, problem);
      }
    } catch (const strobe::Error& error) {
      expect(error.status == status && std::string(error.what()).find(text) != std::string::npos,
             std::string(what) + ": " + error.what());
      return;
    }
  }
  expect(false, std::string(what) + " was accepted");
}

void test_refused() {
  refused("f32", STROBE_UNSUPPORTED, "q is f32, allowed on a GPU is f16 or bf16",
          [](Example& e) { e.q.dtype = e.k.dtype = e.v.dtype = e.out.dtype = STROBE_FLOAT32; });
  refused("head_dim", STROBE_UNSUPPORTED,
          "head_dim of q is 60, allowed on a GPU is a multiple of 8: the nearest are 56 and 64",
          [](Example& e) { e.q.shape[2] = e.k.shape[2] = 60; });
  refused("small head_dim", STROBE_UNSUPPORTED, "head_dim of v is 4, allowed on a GPU is 8 and more",
          [](Example& e) { e.v.shape[2] = 4; });
  refused("data", STROBE_UNSUPPORTED, "the data of k is not aligned, allowed on a GPU is a multiple of 16 bytes",
          [](Example& e) { e.k.data = static_cast<char*>(e.k.data) + 8; });
  refused("stride", STROBE_UNSUPPORTED, "stride 516 of dimension 0 of q, allowed on a GPU is a multiple of 16 bytes",
          [](Example& e) { e.q.stride[0] = 516; });
  refused("out", STROBE_UNSUPPORTED, "the data of out is not aligned",
          [](Example& e) { e.out.data = static_cast<char*>(e.out.data) + 2; });
  refused("sinks", STROBE_UNSUPPORTED, "s_aux is bf16, allowed on a GPU is f32",
          [](Example& e) { e.sinks.dtype = STROBE_BFLOAT16; });
  refused("table on the CPU", STROBE_INVALID_TYPE, "cu_seqlens_k is on cpu but q is on cuda:0",
          [](Example& e) { e.cu_k.device = STROBE_CPU; });
  refused("another GPU", STROBE_INVALID_TYPE,
          "v is on cuda:1 but q is on cuda:0, allowed is one device for all tensors",
          [](Example& e) { e.v.device_index = 1; });
  refused("backend", STROBE_INVALID_VALUE, "backend is 'cpu', allowed for tensors on a GPU is 'auto', 'sm80' or 'sm90'",
          [](Example& e) { e.packed.backend = "cpu"; });
  refused("page_size", STROBE_UNSUPPORTED, "page_size of k_cache is 12, allowed on a GPU is a multiple of 8",
          [](Example& e) { e.pages.shape[1] = e.pages_v.shape[1] = 12; });
  refused("k_new", STROBE_UNSUPPORTED, "the data of v_new is not aligned",
          [](Example& e) { e.v_new.data = static_cast<char*>(e.v_new.data) + 4; });
}

}  // namespace

int main() {
  void* memory = mmap(nullptr, size_t{1} << 30, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) return 1;
  untouchable = static_cast<char*>(memory);
  test_accepted();
  test_refused();
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed != 0;
}
