// The Hopper forward kernel itself, run without a GPU by tests/emulator: random problems against the definition, with
// copies and multiplications that land at random times. What it shows: no thread waits for ever, nothing is read before
// it has landed or overwritten before it has been read, every row is written, nothing behind a length is used.
// usage: test_kernel_sm90 [problems of a Config [share, of so many shares of the Configs]]
#include <cstring>
#include <string>

#include "core/seqlen.h"
#include "core/softmax.h"
#include "cuda/combine.cuh"
#include "cuda/fwd_sm90.cuh"
#include "host/device.h"
#include "host/jit.h"
#include "host/plan_sm90.h"

namespace {

using namespace strobe;
using namespace strobe::host;

std::mt19937 rng;
int below(int n) { return int(rng() % unsigned(n)); }
int pick(std::initializer_list<int> list) { return list.begin()[below(int(list.size()))]; }

constexpr u16 kNan = 0x7fff;

// Rows with room around them, NaN wherever nothing was written.
struct Tensor {
  std::vector<u16> storage;
  Rows rows;
  Tensor(i64 batches, i64 length, i64 heads, i64 dim, bool packed) {
    const i64 head = dim + pick({0, 8}), row = heads * head + pick({0, 16}), batch = (length + below(3)) * row;
    storage.assign(size_t(batches * batch + 64), kNan);
    u16* data = storage.data();
    while (reinterpret_cast<uintptr_t>(data) % 16) ++data;
    rows = {data, packed ? 0 : batch, row, head};
  }
  u16* at(i64 batch, i64 row, i64 head) const {
    return static_cast<u16*>(rows.data) + batch * rows.batch_stride + row * rows.row_stride + head * rows.head_stride;
  }
};

struct Problem {
  AttnParams p;
  std::vector<Tensor> tensors;  // q, k, v, out
  std::vector<i32> cu_q, cu_k, used_q, used_k, leftpad, full_from, table;
  std::vector<float> lse, sinks;
  std::string text;
};

void fill_row(u16* at, i64 dim) {
  std::normal_distribution<float> normal;
  for (i64 c = 0; c < dim; ++c) at[c] = ptx::narrow(normal(rng));
}

Problem make(const FwdSm90Config& c) {
  Problem problem;
  AttnParams& p = problem.p;
  p.dtype = DType::bf16;
  p.head_dim = c.head_dim, p.head_dim_v = c.head_dim_v;
  p.batch = 1 + below(3);
  p.num_heads_k = p.num_heads_v = 1 + below(2);
  p.num_heads = c.pack ? pick({4, 4, 32}) * p.num_heads_k : p.num_heads_k;
  if (!c.pack && below(2)) p.num_heads = p.num_heads_k = 2, p.num_heads_v = 1;
  p.seqlen_q = c.pack ? 1 + below(p.num_heads > 8 ? 9 : 50) : pick({1, 17, 64, 130, 200, 260, 300});
  if (c.cluster > 1) {  // two or four row blocks
    p.batch = 1 + below(2);
    const i64 rows = c.block_m * pick({1, 1, 3}) + pick({1, 40, c.block_m});
    p.seqlen_q = max<i64>(1, rows * p.num_heads_k / (c.pack ? p.num_heads : p.num_heads_k));
  }
  // Long enough for parts of their own, and for pages to be looked up several times.
  p.seqlen_k = pick({1, 31, 64, 100, 200, 333}) + (c.split || (c.paged && below(2)) ? 300 : 0);
  // Large scores: references move, and exponentials against the one before overflow.
  p.scale = float(pick({1, 1, 5, 25})) / std::sqrt(float(c.head_dim));
  p.softcap = c.softcap ? 3.f : 0.f;
  p.causal = below(2);
  if (below(2)) p.window_left = pick({0, 5, 40, 100});
  if (!p.causal && below(3) == 0) p.window_right = pick({0, 7, 60});
  if (p.window_left >= 0 && below(2)) p.keep_first = pick({1, 4, 70});
  if (c.kept) p.window_left = pick({0, 5, 40, 100}), p.keep_first = pick({1, 4, kKeptKeys});
  if (c.cluster > 1) p.causal = false, p.window_left = p.window_right = -1;
  p.force_fa_decode = below(4) == 0;
  i64 rows_q = p.batch * p.seqlen_q, pages = 0;
  if (c.packed) {
    problem.cu_q = problem.cu_k = {0};
    for (i64 b = 0; b < p.batch; ++b) {
      problem.cu_q.push_back(problem.cu_q[size_t(b)] + (b ? below(int(p.seqlen_q) + 1) : i32(p.seqlen_q)));
      problem.cu_k.push_back(problem.cu_k[size_t(b)] + (b ? below(int(p.seqlen_k) + 1) : i32(p.seqlen_k)));
    }
    p.cu_seqlens_q = problem.cu_q.data();
    rows_q = problem.cu_q.back();
    if (!c.paged) p.cu_seqlens_k = problem.cu_k.data(), p.total_k = problem.cu_k.back();
  }
  if (c.paged) {
    p.page_size = c.paged * pick({1, 3});
    p.max_pages = p.page_table_stride = ceil_div(p.seqlen_k, p.page_size);
    p.seqlen_k = p.max_pages * p.page_size;
    p.num_pages = pages = p.batch * p.max_pages + 2;
    for (i64 i = 0; i < p.batch * p.max_pages; ++i) problem.table.push_back(i32((i * 7 + 3) % pages));
  }
  p.total_q = rows_q;
  const bool uses = c.cluster == 1 && (c.paged || below(3) == 0);
  for (i64 b = 0; b < p.batch; ++b) {
    problem.used_k.push_back(below(int(p.seqlen_k) + 1));
    problem.used_q.push_back(below(int(p.seqlen_q) + 1));
    problem.leftpad.push_back(below(9));
    problem.full_from.push_back(below(int(p.seqlen_q) + 2));
  }
  if (uses) p.seqused_k = problem.used_k.data();
  if (uses && (c.paged || !c.packed) && below(3) == 0) p.seqlen_new = 1 + below(20);  // appended before the kernel
  if (c.cluster == 1 && below(4) == 0) p.seqused_q = problem.used_q.data();
  if (!c.paged && !c.packed && below(4) == 0) p.leftpad_k = problem.leftpad.data();
  if (below(4) == 0) p.full_from = problem.full_from.data();
  if (c.paged) p.page_table = problem.table.data();

  const i64 q_batches = c.packed ? 1 : p.batch, q_length = c.packed ? rows_q : p.seqlen_q;
  const i64 k_batches = c.paged ? pages : c.packed ? 1 : p.batch;
  const i64 k_length = c.paged ? p.page_size : c.packed ? p.total_k : p.seqlen_k;
  problem.tensors.emplace_back(q_batches, q_length, p.num_heads, c.head_dim, c.packed);
  problem.tensors.emplace_back(k_batches, k_length, p.num_heads_k, c.head_dim, c.packed && !c.paged);
  problem.tensors.emplace_back(k_batches, k_length, p.num_heads_v, c.head_dim_v, c.packed && !c.paged);
  problem.tensors.emplace_back(q_batches, q_length, p.num_heads, c.head_dim_v, c.packed);
  p.q = problem.tensors[0].rows, p.k = problem.tensors[1].rows;
  p.v = problem.tensors[2].rows, p.out = problem.tensors[3].rows;
  p.lse_head_stride = c.packed ? rows_q : p.seqlen_q;
  p.lse_batch_stride = c.packed ? 0 : p.num_heads * p.seqlen_q;
  problem.lse.assign(size_t(p.num_heads * rows_q), NAN);
  p.lse = problem.lse.data();
  if (below(3) == 0) {
    for (i64 h = 0; h < p.num_heads; ++h) problem.sinks.push_back(float(below(5)) - 2.f);
    p.s_aux = problem.sinks.data();
  }
  // Only what takes part is a number.
  for (i64 b = 0; b < p.batch; ++b) {
    const SeqInfo seq = SeqInfo::of(p, b);
    for (i64 i = 0; i < seq.seqlen_q; ++i)
      for (i64 h = 0; h < p.num_heads; ++h) fill_row(static_cast<u16*>(p.q.data) + seq.q_index(p.q, i, h), c.head_dim);
    for (i64 j = 0; j < seq.seqlen_k; ++j) {
      for (i64 h = 0; h < p.num_heads_k; ++h)
        fill_row(static_cast<u16*>(p.k.data) + seq.k_index(p.k, j, h), c.head_dim);
      for (i64 h = 0; h < p.num_heads_v; ++h)
        fill_row(static_cast<u16*>(p.v.data) + seq.k_index(p.v, j, h), c.head_dim_v);
    }
  }
  problem.text = "batch " + std::to_string(p.batch) + " heads " + std::to_string(p.num_heads) + "/" +
                 std::to_string(p.num_heads_k) + "/" + std::to_string(p.num_heads_v) + " seqlens " +
                 std::to_string(p.seqlen_q) + ", " + std::to_string(p.seqlen_k) + " causal " +
                 std::to_string(p.causal) + " window " + std::to_string(p.window_left) + ", " +
                 std::to_string(p.window_right) + " keep_first " + std::to_string(p.keep_first);
  return problem;
}

// The largest error, in units of what rounding to bfloat16 explains; huge where something is not a number.
double worst_error(const AttnParams& p) {
  double worst = 0;
  std::vector<double> scores(size_t(p.seqlen_k) + 1), out(size_t(p.head_dim_v)), bound(size_t(p.head_dim_v));
  const auto value = [](const Rows& rows, i64 at) {
    return double(ptx::widen(static_cast<const u16*>(rows.data)[at]));
  };
  for (i64 b = 0; b < p.batch; ++b) {
    const SeqInfo seq = SeqInfo::of(p, b);
    const Mask mask = mask_of(p, seq);
    for (i64 i = 0; i < seq.rows_q; ++i)
      for (i64 h = 0; h < p.num_heads; ++h) {
        const i64 hk = h / (p.num_heads / p.num_heads_k), hv = h / (p.num_heads / p.num_heads_v);
        const bool used = i < seq.seqlen_q;
        double top = p.s_aux && used ? p.s_aux[h] : -INFINITY, sum = 0;
        for (i64 j = 0; j < seq.seqlen_k; ++j) {
          scores[size_t(j)] = -INFINITY;
          if (!used || !mask.visible(i, j)) continue;
          double s = 0;
          for (i64 c = 0; c < p.head_dim; ++c)
            s += value(p.q, seq.q_index(p.q, i, h) + c) * value(p.k, seq.k_index(p.k, j, hk) + c);
          s *= p.scale;
          if (p.softcap != 0.f) s = p.softcap * std::tanh(s / p.softcap);
          scores[size_t(j)] = s;
          top = std::max(top, s);
        }
        out.assign(out.size(), 0), bound.assign(bound.size(), 0);
        if (p.s_aux && used) sum = std::exp(p.s_aux[h] - top);
        for (i64 j = 0; j < seq.seqlen_k; ++j) {
          if (scores[size_t(j)] == -INFINITY) continue;
          const double x = std::exp(scores[size_t(j)] - top);
          sum += x;
          for (i64 c = 0; c < p.head_dim_v; ++c) {
            const double v = value(p.v, seq.k_index(p.v, j, hv) + c);
            out[size_t(c)] += x * v, bound[size_t(c)] += x * std::abs(v);
          }
        }
        const float lse = p.lse[seq.lse_index(p, i, h)];
        if (sum == 0) {
          if (!(lse == kInfinity)) return 1e9;
        } else {
          const double error = std::abs(double(lse) - (top + std::log(sum))) / 1e-4;
          worst = error == error ? std::max(worst, error) : 1e9;
        }
        for (i64 c = 0; c < p.head_dim_v; ++c) {
          const double got = value(p.out, seq.q_index(p.out, i, h) + c), norm = sum == 0 ? 1 : sum;
          const double error = std::abs(got - out[size_t(c)] / norm) /
                               (1e-6 + (bound[size_t(c)] + std::abs(out[size_t(c)])) / norm / 256);
          worst = error == error ? std::max(worst, error) : 1e9;
        }
      }
  }
  return worst;
}

// Whether what lies between the rows of `out` is as it was.
bool wrote_rows_only(const Problem& problem) {
  const AttnParams& p = problem.p;
  const std::vector<u16>& storage = problem.tensors[3].storage;
  std::vector<bool> own(storage.size());
  for (i64 b = 0; b < p.batch; ++b) {
    const SeqInfo seq = SeqInfo::of(p, b);
    for (i64 i = 0; i < seq.rows_q; ++i)
      for (i64 h = 0; h < p.num_heads; ++h)
        for (i64 c = 0; c < p.head_dim_v; ++c)
          own[size_t(static_cast<u16*>(p.out.data) - storage.data() + seq.q_index(p.out, i, h) + c)] = true;
  }
  for (size_t at = 0; at < storage.size(); ++at)
    if (!own[at] && storage[at] != kNan) return false;
  return true;
}

// The second kernel of a split call.
template <int kHeadDimV, int kRows>
bool combine_parts(emulator::Cluster& block, const CombineLaunch& launch, u32 blocks) {
  constexpr CombineConfig kConfig = {i32(DType::bf16), kHeadDimV, kRows};
  bool ended = true;
  for (u32 i = 0; ended && i < blocks; ++i)
    ended = block.run(u32(threads(kConfig)), i, blocks, [&] { combine<kConfig>(launch); });
  return ended;
}

int passed = 0, failed = 0;
int own = 0, shares = 1, configs = 0;  // of every `shares` Configs this process runs one

template <FwdSm90Config C>
void run(int problems, unsigned seed) {
  if (configs++ % shares != own) return;
  constexpr int kMasking = C.cluster > 1 ? kPairs : kSomeKeys;
  constexpr FwdSm90Tune kTile = {kAnyRows, 256,        256,       kMasking,   C.block_m, C.block_n,
                                 C.stages, C.pingpong, C.overlap, C.stages_q, C.staging};
  for (int n = 0; n < problems; ++n) {
    rng.seed(seed * 1000 + unsigned(n));
    Problem problem;
    Plan plan;
    // Few shapes are split, or not: others are drawn until the plan has this Config.
    bool as_planned = false;
    for (int tries = 0; tries < 100 && !as_planned; ++tries) {
      problem = make(C);
      DeviceInfo device = typical_device(90);
      device.sm_count = C.split ? 64 : C.cluster > 1 ? pick({2, 3, 4, 8}) : 1 + below(3);
      if (refusal_sm90(problem.p, device)) continue;
      plan = plan_forward_sm90(problem.p, device, &kTile);
      as_planned = plan.count > 0 && plan.launches[0].kernel == kernel_ref(kFwdSm90, C);
    }
    const AttnParams& p = problem.p;
    std::vector<float> workspace(size_t(plan.workspace_bytes / 4) + 64, NAN);
    float* start = workspace.data();
    while (reinterpret_cast<uintptr_t>(start) % kWorkspaceAlign) ++start;
    LaunchParams blocks;
    fill_forward_sm90(p, plan, start, blocks);
    if (plan.zero_bytes) std::memset(blocks.zero, 0, size_t(plan.zero_bytes));
    for (int i = 0; i < blocks.box_count; ++i)
      static_cast<TensorMap*>(blocks.boxes[i].map)->opaque[0] = reinterpret_cast<u64>(&blocks.boxes[i]);
    const auto& launch = *reinterpret_cast<const FwdSm90Launch*>(blocks.blocks[0]);
    emulator::Cluster block(C.cluster, rng());
    bool ended = as_planned;
    for (u32 i = 0; ended && i < plan.launches[0].grid[0]; i += C.cluster)
      ended = block.run(u32(threads(C)), i, plan.launches[0].grid[0], [&] { fwd_sm90<C>(launch); });
    if constexpr (C.split != 0) {
      CombineLaunch parts = *reinterpret_cast<const CombineLaunch*>(blocks.blocks[1]);
      if (n % 2 || rows_of_block(parts.num_splits) == 1) {  // a block for each row, also where a warp may merge a few
        parts.rows = FastDivisor::of(u32(p.seqlen_q));
        ended = ended && combine_parts<C.head_dim_v, 1>(block, parts, u32(p.batch * p.num_heads * p.seqlen_q));
      } else {
        constexpr int kRows = rows_of_block(kFewParts);
        ended = ended && combine_parts<C.head_dim_v, kRows>(block, parts, plan.launches[1].grid[0]);
      }
    }
    const double error = !ended ? 0 : wrote_rows_only(problem) ? worst_error(p) : 1e10;
    const bool good = ended && error <= 1;
    good ? ++passed : ++failed;
    if (!good)
      std::printf("FAILED %s, problem %d: %s: %s %g\n", describe(kernel_ref(kFwdSm90, C)).c_str(), n,
                  problem.text.c_str(),
                  !as_planned ? "the plan has another Config"
                  : ended     ? "error"
                              : "threads wait for each other",
                  error);
  }
}

}  // namespace

int main(int count, char** arguments) {
  const int problems = count > 1 ? std::atoi(arguments[1]) : 9;
  if (count > 3) own = std::atoi(arguments[2]), shares = std::atoi(arguments[3]);
  // dtype, dims, block_m, block_n, stages, stages_q, pingpong, overlap, packed, paged, split, pack, softcap, staging,
  // kept, cluster
  run<FwdSm90Config{3, 64, 64, 128, 32, 2, 2, 1}>(problems, 1);
  run<FwdSm90Config{3, 64, 64, 192, 48, 2, 2, 1}>(problems, 2);
  run<FwdSm90Config{3, 40, 72, 128, 48, 2, 1, 0, 1, 0, 0, 0, 0, 1}>(problems, 3);
  run<FwdSm90Config{3, 128, 32, 128, 80, 3, 1, 1, 1, 1}>(problems, 4);
  run<FwdSm90Config{3, 64, 64, 64, 32, 3, 1, 0, 1, 1, 0, 0, 1}>(problems, 5);
  run<FwdSm90Config{3, 64, 136, 64, 32, 2, 1, 0, 1, 0, 0, 1, 1}>(problems, 6);
  run<FwdSm90Config{3, 64, 64, 64, 64, 2, 1, 0, 1, 0, 16, 1, 1}>(problems, 7);
  run<FwdSm90Config{3, 80, 64, 128, 48, 2, 1, 0, 1, 0, 8}>(problems, 8);
  run<FwdSm90Config{3, 64, 64, 128, 32, 2, 1, 1, 1, 0, 16}>(problems, 9);
  run<FwdSm90Config{3, 64, 64, 128, 48, 2, 1, 1, 1, 1, 8}>(problems, 10);
  run<FwdSm90Config{3, 64, 64, 64, 32, 2, 1, 0, 1, 1, 8, 0, 1}>(problems, 11);
  run<FwdSm90Config{3, 64, 200, 128, 32, 2, 2, 1}>(problems, 10);
  run<FwdSm90Config{3, 64, 200, 128, 32, 2, 1, 1}>(problems, 12);
  run<FwdSm90Config{3, 64, 64, 128, 32, 2, 1, 1}>(problems, 13);
  run<FwdSm90Config{3, 64, 64, 192, 64, 3, 2, 0}>(problems, 14);
  run<FwdSm90Config{3, 64, 64, 192, 48, 2, 1, 1, 1, 1}>(problems, 15);
  run<FwdSm90Config{3, 64, 64, 192, 32, 3, 2, 0, 1, 0, 0, 0, 1}>(problems, 16);
  run<FwdSm90Config{3, 72, 64, 192, 48, 2, 1, 1, 1, 1, 0, 0, 1}>(problems, 17);
  run<FwdSm90Config{3, 64, 64, 256, 48, 3, 1, 1, 0}>(problems, 21);
  run<FwdSm90Config{3, 32, 64, 256, 32, 3, 1, 1, 0, 1}>(problems, 22);
  run<FwdSm90Config{3, 64, 40, 256, 32, 2, 2, 0, 0, 0, 0, 0, 1}>(problems, 23);
  run<FwdSm90Config{3, 64, 64, 256, 48, 2, 1, 1, 0, 0, 0, 1}>(problems, 24);
  run<FwdSm90Config{3, 32, 64, 192, 144, 2, 1, 1, 0}>(problems, 25);
  run<FwdSm90Config{3, 64, 104, 192, 32, 3, 2, 1, 0}>(problems, 26);
  run<FwdSm90Config{3, 128, 64, 128, 48, 2, 1, 0, 0, 1}>(problems, 27);
  run<FwdSm90Config{3, 32, 64, 256, 80, 2, 1, 1, 0, 1}>(problems, 28);
  run<FwdSm90Config{3, 128, 128, 128, 64, 2, 2, 1, 1, 0, 0, 0, 0, 0, kInPlaceOfQ}>(problems, 30);
  run<FwdSm90Config{3, 128, 72, 192, 48, 2, 2, 1, 0, 0, 0, 0, 1, 0, kInPlaceOfQ}>(problems, 31);
  run<FwdSm90Config{3, 64, 40, 128, 48, 3, 2, 1, 1, 1, 0, 0, 0, 0, kInPlaceOfQ}>(problems, 32);
  run<FwdSm90Config{3, 96, 96, 192, 32, 2, 2, 1, 1, 1, 0, 0, 1, 0, kInPlaceOfQ}>(problems, 33);
  run<FwdSm90Config{3, 64, 64, 256, 48, 3, 2, 1, 0, 0, 0, 0, 0, 0, kInPlaceOfQ}>(problems, 34);
  run<FwdSm90Config{3, 128, 200, 128, 32, 2, 1, 1, 1, 0, 0, 0, 0, 0, kInOwnPlace}>(problems, 35);
  run<FwdSm90Config{3, 64, 104, 192, 32, 2, 2, 1, 0, 1, 0, 0, 1, 0, kInOwnPlace}>(problems, 36);
  run<FwdSm90Config{3, 40, 64, 64, 32, 2, 1, 0, 1, 1, 0, 0, 0, 0, kInOwnPlace}>(problems, 37);
  run<FwdSm90Config{3, 64, 64, 128, 32, 2, 2, 1, 1, 0, 16, 0, 0, 0, kInPlaceOfQ}>(problems, 40);
  run<FwdSm90Config{3, 64, 64, 192, 48, 2, 2, 1, 1, 1, 8, 0, 1, 0, kInPlaceOfQ}>(problems, 41);
  run<FwdSm90Config{3, 64, 40, 192, 32, 3, 2, 1, 0, 0, 32, 0, 1, 0, kInPlaceOfQ}>(problems, 42);
  run<FwdSm90Config{3, 64, 104, 128, 32, 2, 2, 0, 1, 1, 16, 0, 0, 0, kInOwnPlace}>(problems, 43);
  run<FwdSm90Config{3, 72, 64, 192, 48, 3, 1, 1, 0, 0, 16, 0, 1}>(problems, 44);
  run<FwdSm90Config{3, 64, 64, 64, 32, 2, 1, 0, 1, 0, 0, 0, 1, 0, kFromRegisters, 1}>(problems, 50);
  run<FwdSm90Config{3, 64, 72, 128, 32, 2, 1, 1, 1, 0, 0, 0, 0, 1, kFromRegisters, 1}>(problems, 51);
  run<FwdSm90Config{3, 64, 64, 192, 48, 2, 2, 1, 1, 1, 0, 0, 1, 0, kInPlaceOfQ, 1}>(problems, 52);
  run<FwdSm90Config{3, 64, 64, 256, 48, 3, 2, 1, 0, 0, 0, 0, 1, 0, kInPlaceOfQ, 1}>(problems, 53);
  run<FwdSm90Config{3, 40, 104, 128, 32, 2, 1, 0, 0, 1, 8, 0, 0, 0, kFromRegisters, 1}>(problems, 54);
  run<FwdSm90Config{3, 64, 64, 64, 32, 2, 1, 0, 1, 0, 16, 1, 1, 0, kFromRegisters, 1}>(problems, 55);
  run<FwdSm90Config{3, 32, 64, 256, 64, 2, 2, 1, 0, 0, 0, 0, 1, 0, kInPlaceOfQ, 1}>(problems, 56);
  run<FwdSm90Config{3, 64, 64, 128, 32, 2, 1, 1, 1, 0, 0, 0, 0, 0, kFromRegisters, 0, 2}>(problems, 60);
  run<FwdSm90Config{3, 136, 72, 192, 48, 3, 1, 1, 1, 0, 0, 0, 0, 0, kFromRegisters, 0, 2}>(problems, 61);
  run<FwdSm90Config{3, 72, 200, 128, 32, 2, 1, 0, 1, 0, 0, 0, 1, 1, kFromRegisters, 0, 2}>(problems, 62);
  run<FwdSm90Config{3, 64, 40, 256, 32, 2, 2, 1, 0, 0, 0, 0, 1, 0, kInPlaceOfQ, 0, 2}>(problems, 63);
  run<FwdSm90Config{3, 128, 128, 128, 64, 2, 2, 1, 1, 0, 0, 0, 0, 0, kInPlaceOfQ, 0, 2}>(problems, 64);
  run<FwdSm90Config{3, 72, 200, 128, 32, 3, 1, 1, 0, 0, 0, 0, 0, 0, kFromRegisters, 0, 2}>(problems, 65);
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed != 0;
}
