// The C ABI from a C caller's side: results against a plain definition in double, status codes, executors, threads.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "strobe/strobe.h"

namespace {

int passed = 0, failed = 0;

void expect(bool ok, const char* test, const std::string& what) {
  ok ? ++passed : ++failed;
  if (!ok) std::printf("FAILED %s: %s\n", test, what.c_str());
}

strobe_tensor tensor(void* data, int32_t dtype, const std::vector<int64_t>& shape) {
  strobe_tensor t{};
  t.data = data;
  t.dtype = dtype;
  t.device = STROBE_CPU;
  t.ndim = static_cast<int32_t>(shape.size());
  int64_t stride = 1;
  for (int i = t.ndim - 1; i >= 0; --i) {
    t.shape[i] = shape[static_cast<size_t>(i)];
    t.stride[i] = stride;
    stride *= t.shape[i];
  }
  return t;
}

// A contiguous tensor with its own memory.
template <class T>
struct Owned {
  std::vector<T> values;
  strobe_tensor t;

  Owned(int32_t dtype, const std::vector<int64_t>& shape) {
    size_t n = 1;
    for (int64_t size : shape) n *= static_cast<size_t>(size);
    values.resize(n);
    t = tensor(values.data(), dtype, shape);
  }
  Owned(const Owned&) = delete;
};

struct Floats : Owned<float> {
  explicit Floats(const std::vector<int64_t>& shape, unsigned seed = 0) : Owned(STROBE_FLOAT32, shape) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    for (float& value : values) value = seed ? normal(random) : NAN;
  }
};

struct Ints : Owned<int32_t> {
  explicit Ints(const std::vector<int32_t>& given) : Owned(STROBE_INT32, {static_cast<int64_t>(given.size())}) {
    for (size_t i = 0; i < given.size(); ++i) values[i] = given[i];
  }
};

constexpr int kBatch = 2, kQueries = 5, kKeys = 7, kHeads = 4, kHeadsK = 2, kHeadsV = 1, kDim = 8, kDimV = 12;

// Causal attention by its definition; keys at or behind `used` do not exist.
void reference(const std::vector<double>& q, const std::vector<float>& k, const std::vector<float>& v, int sk, int used,
               std::vector<double>& out, std::vector<double>& lse) {
  out.assign(kBatch * kQueries * kHeads * kDimV, 0);
  lse.assign(kBatch * kHeads * kQueries, INFINITY);
  for (int b = 0; b < kBatch; ++b) {
    for (int h = 0; h < kHeads; ++h) {
      for (int i = 0; i < kQueries; ++i) {
        const int end = std::min(used, i + used - kQueries + 1);
        double sum = 0;
        double* o = &out[static_cast<size_t>(((b * kQueries + i) * kHeads + h) * kDimV)];
        for (int j = 0; j < end; ++j) {
          double s = 0;
          const int row_q = (b * kQueries + i) * kHeads + h;
          const int row_k = (b * sk + j) * kHeadsK + h / (kHeads / kHeadsK);
          const int row_v = (b * sk + j) * kHeadsV + h / (kHeads / kHeadsV);
          for (int c = 0; c < kDim; ++c)
            s += q[static_cast<size_t>(row_q * kDim + c)] * k[static_cast<size_t>(row_k * kDim + c)];
          const double weight = std::exp(s / std::sqrt(double(kDim)));
          sum += weight;
          for (int c = 0; c < kDimV; ++c) o[c] += weight * v[static_cast<size_t>(row_v * kDimV + c)];
        }
        for (int c = 0; c < kDimV && sum > 0; ++c) o[c] /= sum;
        if (sum > 0) lse[static_cast<size_t>((b * kHeads + h) * kQueries + i)] = std::log(sum);
      }
    }
  }
}

double largest_difference(const std::vector<float>& given, const std::vector<double>& wanted) {
  double largest = 0;
  for (size_t i = 0; i < wanted.size(); ++i) {
    if (std::isinf(wanted[i]) && given[i] == static_cast<float>(wanted[i])) continue;
    const double difference = std::fabs(given[i] - wanted[i]);
    if (!(difference <= largest)) largest = difference;  // NaN is the largest of all
  }
  return largest;
}

// A valid causal call.
struct Forward {
  Floats q{{kBatch, kQueries, kHeads, kDim}, 1};
  Floats k{{kBatch, kKeys, kHeadsK, kDim}, 2};
  Floats v{{kBatch, kKeys, kHeadsV, kDimV}, 3};
  Floats out{{kBatch, kQueries, kHeads, kDimV}};
  Floats lse{{kBatch, kHeads, kQueries}};
  strobe_args args;

  Forward() {
    strobe_args_init(&args);
    args.q = &q.t;
    args.k = &k.t;
    args.v = &v.t;
    args.out = &out.t;
    args.lse = &lse.t;
    args.causal = 1;
  }
  std::vector<double> q_double() const { return {q.values.begin(), q.values.end()}; }
};

void test_forward() {
  Forward f;
  expect(strobe_forward(&f.args) == STROBE_OK, "forward", strobe_last_error());
  expect(std::strcmp(strobe_last_error(), "") == 0, "forward", "text left after a call that succeeded");
  std::vector<double> out, lse;
  reference(f.q_double(), f.k.values, f.v.values, kKeys, kKeys, out, lse);
  expect(largest_difference(f.out.values, out) < 2e-5, "forward", "out differs");
  expect(largest_difference(f.lse.values, lse) < 2e-5, "forward", "lse differs");

  Forward without_lse;
  without_lse.args.lse = nullptr;
  expect(strobe_forward(&without_lse.args) == STROBE_OK, "forward without lse", strobe_last_error());
  expect(without_lse.out.values == f.out.values, "forward without lse", "out differs");
}

void test_packed() {
  Forward f, packed;
  strobe_forward(&f.args);
  Ints cu_q({0, kQueries, 2 * kQueries}), cu_k({0, kKeys, 2 * kKeys});
  packed.q.t = tensor(packed.q.values.data(), STROBE_FLOAT32, {kBatch * kQueries, kHeads, kDim});
  packed.k.t = tensor(packed.k.values.data(), STROBE_FLOAT32, {kBatch * kKeys, kHeadsK, kDim});
  packed.v.t = tensor(packed.v.values.data(), STROBE_FLOAT32, {kBatch * kKeys, kHeadsV, kDimV});
  packed.out.t = tensor(packed.out.values.data(), STROBE_FLOAT32, {kBatch * kQueries, kHeads, kDimV});
  packed.args.lse = nullptr;
  packed.args.cu_seqlens_q = &cu_q.t;
  packed.args.cu_seqlens_k = &cu_k.t;
  expect(strobe_forward(&packed.args) == STROBE_OK, "packed", strobe_last_error());
  const std::vector<double> wanted(f.out.values.begin(), f.out.values.end());
  expect(largest_difference(packed.out.values, wanted) < 2e-6, "packed", "out differs from the fixed layout's");
}

// <gradient, direction> against the difference quotient of the reference.
void test_backward() {
  Forward f;
  Floats dout({kBatch, kQueries, kHeads, kDimV}, 4), direction({kBatch, kQueries, kHeads, kDim}, 5);
  Floats dq({kBatch, kQueries, kHeads, kDim}), dk({kBatch, kKeys, kHeadsK, kDim}), dv({kBatch, kKeys, kHeadsV, kDimV});
  strobe_forward(&f.args);
  strobe_backward_args args;
  strobe_backward_args_init(&args);
  args.fwd = f.args;
  args.dout = &dout.t;
  args.dq = &dq.t;
  args.dk = &dk.t;
  args.dv = &dv.t;
  expect(strobe_backward(&args) == STROBE_OK, "backward", strobe_last_error());

  const auto loss = [&](double step) {
    std::vector<double> q = f.q_double(), out, lse;
    for (size_t i = 0; i < q.size(); ++i) q[i] += step * direction.values[i];
    reference(q, f.k.values, f.v.values, kKeys, kKeys, out, lse);
    double sum = 0;
    for (size_t i = 0; i < out.size(); ++i) sum += out[i] * dout.values[i];
    return sum;
  };
  double along = 0, along_v = 0, out_dout = 0;
  for (size_t i = 0; i < dq.values.size(); ++i) along += double(dq.values[i]) * direction.values[i];
  expect(std::fabs(along - (loss(1e-4) - loss(-1e-4)) / 2e-4) < 1e-4, "backward", "dq is not the derivative");
  // out is linear in v, and q times its gradient equals k times its own: both enter by their product alone.
  for (size_t i = 0; i < dv.values.size(); ++i) along_v += double(dv.values[i]) * f.v.values[i];
  for (size_t i = 0; i < dout.values.size(); ++i) out_dout += double(f.out.values[i]) * dout.values[i];
  expect(std::fabs(along_v - out_dout) < 1e-3, "backward", "<dv, v> is not <dout, out>");
  double q_dq = 0, k_dk = 0;
  for (size_t i = 0; i < dq.values.size(); ++i) q_dq += double(dq.values[i]) * f.q.values[i];
  for (size_t i = 0; i < dk.values.size(); ++i) k_dk += double(dk.values[i]) * f.k.values[i];
  expect(std::fabs(q_dq - k_dk) < 1e-3, "backward", "<dk, k> is not <dq, q>");
}

void test_kvcache() {
  constexpr int kCapacity = 9, kUsed = 4, kNew = 3;
  Forward f;
  Floats k_cache({kBatch, kCapacity, kHeadsK, kDim}, 6), v_cache({kBatch, kCapacity, kHeadsV, kDimV}, 7);
  Floats k_new({kBatch, kNew, kHeadsK, kDim}, 8), v_new({kBatch, kNew, kHeadsV, kDimV}, 9);
  std::vector<float> k = k_cache.values, v = v_cache.values;
  for (int b = 0; b < kBatch; ++b) {
    std::memcpy(&k[size_t(b * kCapacity + kUsed) * kHeadsK * kDim], &k_new.values[size_t(b * kNew) * kHeadsK * kDim],
                sizeof(float) * kNew * kHeadsK * kDim);
    std::memcpy(&v[size_t(b * kCapacity + kUsed) * kHeadsV * kDimV], &v_new.values[size_t(b * kNew) * kHeadsV * kDimV],
                sizeof(float) * kNew * kHeadsV * kDimV);
  }
  Ints used({kUsed, kUsed});
  strobe_kvcache_args args;
  strobe_kvcache_args_init(&args);
  args.fwd = f.args;
  args.fwd.k = &k_cache.t;
  args.fwd.v = &v_cache.t;
  args.fwd.seqused_k = &used.t;
  args.k_new = &k_new.t;
  args.v_new = &v_new.t;
  expect(strobe_kvcache(&args) == STROBE_OK, "kvcache", strobe_last_error());
  expect(k_cache.values == k && v_cache.values == v, "kvcache", "new keys are not where they belong");
  std::vector<double> out, lse;
  reference(f.q_double(), k, v, kCapacity, kUsed + kNew, out, lse);
  expect(largest_difference(f.out.values, out) < 2e-5, "kvcache", "out differs");
  expect(largest_difference(f.lse.values, lse) < 2e-5, "kvcache", "lse differs");
}

void test_errors() {
  struct Case {
    const char* name;
    int32_t status;
    const char* text;
    std::function<void(Forward&)> spoil;
  };
  const Case cases[] = {
      {"struct_size", STROBE_INVALID_VALUE, "struct_size", [](Forward& f) { f.args.struct_size = 8; }},
      {"missing q", STROBE_INVALID_VALUE, "q is missing", [](Forward& f) { f.args.q = nullptr; }},
      {"missing out", STROBE_INVALID_VALUE, "out is missing", [](Forward& f) { f.args.out = nullptr; }},
      {"null data", STROBE_INVALID_VALUE, "data is null", [](Forward& f) { f.k.t.data = nullptr; }},
      {"misaligned", STROBE_INVALID_VALUE, "not aligned",
       [](Forward& f) { f.k.t.data = static_cast<char*>(f.k.t.data) + 1; }},
      {"negative size", STROBE_INVALID_VALUE, "size -1 of dimension 1", [](Forward& f) { f.q.t.shape[1] = -1; }},
      {"huge size", STROBE_INVALID_VALUE, "2^40", [](Forward& f) { f.q.t.shape[1] = INT64_MAX; }},
      {"huge stride", STROBE_INVALID_VALUE, "no overflow", [](Forward& f) { f.q.t.stride[1] = INT64_MAX; }},
      {"negative stride", STROBE_INVALID_VALUE, "stride -8", [](Forward& f) { f.q.t.stride[1] = -8; }},
      {"last stride", STROBE_INVALID_VALUE, "stride 2, allowed is 1", [](Forward& f) { f.v.t.stride[3] = 2; }},
      {"rank", STROBE_INVALID_VALUE, "k has 5 dimensions, allowed is 4", [](Forward& f) { f.k.t.ndim = 5; }},
      {"out stride 0", STROBE_INVALID_VALUE, "share memory", [](Forward& f) { f.out.t.stride[2] = 0; }},
      {"out is q", STROBE_INVALID_VALUE, "out overlaps q", [](Forward& f) { f.out.t.data = f.q.t.data; }},
      {"lse is out", STROBE_INVALID_VALUE, "lse overlaps out", [](Forward& f) { f.lse.t.data = f.out.t.data; }},
      {"lse shape", STROBE_INVALID_VALUE, "lse has shape", [](Forward& f) { f.lse.t.shape[1] = 1; }},
      {"lse dtype", STROBE_INVALID_TYPE, "lse is f16", [](Forward& f) { f.lse.t.dtype = STROBE_FLOAT16; }},
      {"q dtype", STROBE_INVALID_TYPE, "q is int64", [](Forward& f) { f.q.t.dtype = STROBE_INT64; }},
      {"unnamed dtype", STROBE_INVALID_TYPE, "of another dtype", [](Forward& f) { f.q.t.dtype = STROBE_OTHER; }},
      {"mixed dtype", STROBE_INVALID_TYPE, "v is bf16", [](Forward& f) { f.v.t.dtype = STROBE_BFLOAT16; }},
      {"device", STROBE_INVALID_TYPE, "q is on a device that Strobe does not know, allowed is cpu or cuda",
       [](Forward& f) { f.q.t.device = STROBE_OTHER_DEVICE; }},
      {"q elsewhere", STROBE_INVALID_TYPE, "k is on cpu but q is on cuda:0",
       [](Forward& f) { f.q.t.device = STROBE_CUDA; }},
      {"mixed devices", STROBE_INVALID_TYPE, "k is on cuda:0 but q is on cpu",
       [](Forward& f) { f.k.t.device = STROBE_CUDA; }},
      {"cache row", STROBE_INVALID_VALUE, "cache_batch_idx is given",
       [](Forward& f) { f.args.cache_batch_idx = &f.q.t; }},
      {"backend", STROBE_INVALID_VALUE, "backend is 'sm9'", [](Forward& f) { f.args.backend = "sm9"; }},
      {"function name", STROBE_INVALID_VALUE, "my_attention: dropout_p is 1, allowed is [0, 1)",
       [](Forward& f) {
         f.args.function = "my_attention";
         f.args.dropout_p = 1;
       }},
  };
  for (const Case& c : cases) {
    Forward f;
    c.spoil(f);
    const int32_t status = strobe_forward(&f.args);
    const std::string text = strobe_last_error();
    expect(status == c.status, c.name, "status " + std::to_string(status) + ": " + text);
    expect(text.find(c.text) != std::string::npos, c.name, "text: " + text);
    expect(c.name == std::string("function name") || text.rfind("strobe_forward: ", 0) == 0, c.name, "text: " + text);
    bool written = false;
    for (float value : f.out.values) written |= !std::isnan(value);
    expect(!written, c.name, "out was written");
  }
  expect(strobe_forward(nullptr) == STROBE_INVALID_VALUE, "null", "status of a null struct");
  expect(strobe_backward(nullptr) == STROBE_INVALID_VALUE, "null", "status of a null struct");
  expect(strobe_kvcache(nullptr) == STROBE_INVALID_VALUE, "null", "status of a null struct");
  std::string other = "unset";
  std::thread([&] { other = strobe_last_error(); }).join();
  expect(other.empty(), "last error", "is seen by another thread");
}

// A valid backward call but for what the cases spoil.
struct Backward {
  Forward f;
  Floats dout{{kBatch, kQueries, kHeads, kDimV}, 4};
  Floats dlse{{kBatch, kHeads, kQueries}, 5};
  Floats dq{{kBatch, kQueries, kHeads, kDim}};
  Floats dk{{kBatch, kKeys, kHeadsK, kDim}};
  Floats dv{{kBatch, kKeys, kHeadsV, kDimV}};
  Floats sinks{{kHeads}, 6};
  strobe_backward_args args;

  Backward() {
    strobe_backward_args_init(&args);
    args.fwd = f.args;
    args.dout = &dout.t;
    args.dlse = &dlse.t;
    args.dq = &dq.t;
    args.dk = &dk.t;
    args.dv = &dv.t;
  }
};

void test_backward_errors() {
  struct Case {
    int32_t status;
    const char* text;
    std::function<void(Backward&)> spoil;
  };
  Ints pages({0, 0});
  const Case cases[] = {
      {STROBE_INVALID_VALUE, "struct_size of strobe_backward_args", [](Backward& b) { b.args.struct_size = 0; }},
      {STROBE_INVALID_VALUE, "struct_size of strobe_args", [](Backward& b) { b.args.fwd.struct_size = 0; }},
      {STROBE_INVALID_VALUE, "out is missing", [](Backward& b) { b.args.fwd.out = nullptr; }},
      {STROBE_INVALID_VALUE, "lse is missing", [](Backward& b) { b.args.fwd.lse = nullptr; }},
      {STROBE_INVALID_VALUE, "dout is missing", [](Backward& b) { b.args.dout = nullptr; }},
      {STROBE_INVALID_VALUE, "dq is missing", [](Backward& b) { b.args.dq = nullptr; }},
      {STROBE_INVALID_VALUE, "dk is missing", [](Backward& b) { b.args.dk = nullptr; }},
      {STROBE_INVALID_VALUE, "dv is missing", [](Backward& b) { b.args.dv = nullptr; }},
      {STROBE_INVALID_VALUE, "dout has shape", [](Backward& b) { b.dout.t.shape[3] = kDim; }},
      {STROBE_INVALID_TYPE, "dout is bf16", [](Backward& b) { b.dout.t.dtype = STROBE_BFLOAT16; }},
      {STROBE_INVALID_VALUE, "dlse has shape", [](Backward& b) { b.dlse.t.shape[1] = 1; }},
      {STROBE_INVALID_VALUE, "dlse has stride 0", [](Backward& b) { b.dlse.t.stride[0] = 0; }},
      {STROBE_INVALID_VALUE, "dq has shape", [](Backward& b) { b.dq.t.shape[1] = 1; }},
      {STROBE_INVALID_VALUE, "dk has shape", [](Backward& b) { b.dk.t.shape[2] = kHeads; }},
      {STROBE_INVALID_VALUE, "dv has shape", [](Backward& b) { b.dv.t.shape[3] = kDim; }},
      {STROBE_INVALID_TYPE, "dk is f16", [](Backward& b) { b.dk.t.dtype = STROBE_FLOAT16; }},
      {STROBE_INVALID_VALUE, "dk is written", [](Backward& b) { b.dk.t.stride[0] = 0; }},
      {STROBE_INVALID_VALUE, "dq overlaps q", [](Backward& b) { b.dq.t.data = b.f.q.t.data; }},
      {STROBE_INVALID_VALUE, "dv overlaps dout", [](Backward& b) { b.dv.t.data = b.dout.t.data; }},
      {STROBE_INVALID_VALUE, "dq overlaps dk", [](Backward& b) { b.dk.t.data = b.dq.t.data; }},
      {STROBE_INVALID_VALUE, "ds_aux is missing", [](Backward& b) { b.args.fwd.s_aux = &b.sinks.t; }},
      {STROBE_INVALID_VALUE, "ds_aux is given", [](Backward& b) { b.args.ds_aux = &b.sinks.t; }},
      {STROBE_INVALID_VALUE, "page_table has 1 dimensions",
       [&](Backward& b) {
         b.args.fwd.page_table = &pages.t;
         b.args.fwd.seqused_k = &pages.t;
       }},
  };
  for (const Case& c : cases) {
    Backward b;
    c.spoil(b);
    expect(strobe_backward(&b.args) == c.status, c.text, std::string("status; text: ") + strobe_last_error());
    const std::string text = strobe_last_error();
    expect(text.rfind("strobe_backward: ", 0) == 0 && text.find(c.text) != std::string::npos &&
               text.find("allowed is") != std::string::npos,
           c.text, "text: " + text);
    bool written = false;
    for (const Floats* gradient : {&b.dq, &b.dk, &b.dv}) {
      for (float value : gradient->values) written |= !std::isnan(value);
    }
    expect(!written, c.text, "a gradient was written");
  }
}

void test_kvcache_errors() {
  Forward f;
  Ints used({3, 3});
  strobe_kvcache_args args;
  strobe_kvcache_args_init(&args);
  args.fwd = f.args;
  const auto refused = [&](const char* wanted) {
    const int32_t status = strobe_kvcache(&args);
    const std::string text = strobe_last_error();
    expect(status == STROBE_INVALID_VALUE && text.rfind("strobe_kvcache: ", 0) == 0 &&
               text.find(wanted) != std::string::npos,
           "kvcache errors", "text: " + text);
  };
  args.fwd.seqused_q = &used.t;
  refused("seqused_q is given, allowed is none in a call with a cache");
  args.fwd.seqused_q = nullptr;
  args.fwd.dropout_p = 0.25;
  refused("dropout_p is 0.25, allowed is 0 in a call with a cache");
  args.fwd.dropout_p = 0;
  args.fwd.seqused_k = &used.t;
  args.k_new = &f.k.t;
  args.v_new = &f.v.t;
  refused("k_cache overlaps k_new");
  args.struct_size = 1;
  refused("struct_size of strobe_kvcache_args is 1");
}

void test_interleaved_views() {
  // q and out as two halves of one buffer's heads: they reach over each other but share no element.
  Floats both({kBatch, kQueries, 2 * kHeads, kDim}, 10), k({kBatch, kKeys, kHeadsK, kDim}, 2);
  strobe_tensor q = both.t, out = both.t;
  q.shape[2] = out.shape[2] = kHeads;
  out.data = both.values.data() + kHeads * kDim;
  strobe_args args;
  strobe_args_init(&args);
  args.q = &q;
  args.k = args.v = &k.t;
  args.out = &out;
  expect(strobe_forward(&args) == STROBE_OK, "interleaved views", strobe_last_error());
  out.data = both.values.data() + kDim;
  expect(strobe_forward(&args) == STROBE_INVALID_VALUE, "interleaved views", "a shared head passed");
}

void test_executor() {
  struct Counter {
    int runs = 0, tasks = 0;
  } counter;
  strobe_executor executor{&counter, [](void*) -> int32_t { return 3; },
                           [](void* context, int32_t n, strobe_task task, void* state) {
                             auto* c = static_cast<Counter*>(context);
                             ++c->runs;
                             for (int32_t w = n; w-- > 0; ++c->tasks) task(state, w);
                           }};
  // Large enough that sharing the work pays.
  const std::vector<int64_t> shape{2, 150, 8, 64};
  const Floats q(shape, 1), k(shape, 2), v(shape, 3);
  Floats own(shape), given(shape);
  strobe_args args;
  strobe_args_init(&args);
  args.q = &q.t;
  args.k = &k.t;
  args.v = &v.t;
  args.out = &own.t;
  expect(strobe_forward(&args) == STROBE_OK, "executor", strobe_last_error());
  args.out = &given.t;
  args.executor = &executor;
  expect(strobe_forward(&args) == STROBE_OK, "executor", strobe_last_error());
  expect(counter.runs > 0 && counter.tasks >= counter.runs, "executor", "was not used");
  expect(given.values == own.values, "executor", "out depends on who runs the tasks");
}

void test_concurrent_callers() {
  Forward alone;
  strobe_forward(&alone.args);
  int right[4] = {};
  std::vector<std::thread> callers;
  for (int& count : right) {
    callers.emplace_back([&] {
      for (int i = 0; i < 20; ++i) {
        Forward f;
        count += strobe_forward(&f.args) == STROBE_OK && f.out.values == alone.out.values;
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  for (int count : right) expect(count == 20, "concurrent callers", "results differ");
}

}  // namespace

int main() {
  expect(std::strcmp(strobe_version(), STROBE_VERSION) == 0, "version", strobe_version());
  expect(std::strlen(strobe_cpu_isa()) > 0, "cpu isa", "is not named");
  test_forward();
  test_packed();
  test_backward();
  test_kvcache();
  test_errors();
  test_backward_errors();
  test_kvcache_errors();
  test_interleaved_views();
  test_executor();
  test_concurrent_callers();
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed ? 1 : 0;
}
