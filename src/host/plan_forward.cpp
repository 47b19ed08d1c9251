// Chooses tiles, packing and splits from the problem's shape alone: lengths in device memory are not read.
#include "host/plan_forward.h"

#include "host/tune.h"

namespace strobe::host {
namespace {

// What a Plan's offsets and values hold.
enum Offset { kPartialOut, kPartialState, kTurnedQ };
enum Value { kGroup, kRowBlocks, kForwardLaunch };

constexpr i64 kMaxSplits = 128;
constexpr i64 kPackTokens = 256;  // longer queries fill their tiles without packing

i64 gcd(i64 a, i64 b) {
  while (b != 0) {
    const i64 rest = a % b;
    a = b;
    b = rest;
  }
  return a;
}

bool empty(const AttnParams& p) { return p.batch == 0 || p.num_heads == 0 || p.seqlen_q == 0 || p.total_q == 0; }

// Keys that a row block of `tokens` queries can see at most.
i64 visible_keys(const AttnParams& p, i64 tokens) {
  const bool unbounded = p.window_left < 0 || p.full_from || (p.force_fa_decode && p.seqlen_q == 1);
  if (unbounded) return p.seqlen_k;
  const i64 right = p.causal ? 0 : p.window_right < 0 ? p.seqlen_k : p.window_right;
  return min(p.seqlen_k,
             min(p.keep_first, p.seqlen_k) + min(p.window_left, p.seqlen_k) + min(right, p.seqlen_k) + tokens);
}

struct Shape {
  FwdConfig config;
  i64 group, m_blocks, tiles, blocks;  // blocks: of all row blocks, heads and sequences
  bool fits;
};

Shape shape_of(const AttnParams& p, const DeviceInfo& device) {
  Shape s{};
  FwdConfig& c = s.config;
  c.dtype = i32(p.dtype);
  c.head_dim = i32(p.head_dim);
  c.head_dim_v = i32(p.head_dim_v);
  c.paged = p.page_size != 0;
  c.softcap = p.softcap != 0.f;
  c.alibi = p.alibi_slopes != nullptr || !(p.scale > 0.f);
  c.dropout = p.dropout_p > 0.f;
  s.group = gcd(p.num_heads / p.num_heads_k, p.num_heads / p.num_heads_v);
  if (c.dropout || p.seqlen_q > kPackTokens) s.group = 1;
  c.pack = s.group > 1;
  const i64 rows = p.seqlen_q * s.group;
  s.fits = p.head_dim % 8 == 0 && p.head_dim_v % 8 == 0 && tune_forward(c, rows, device.smem_per_block);
  if (!s.fits) return s;
  s.m_blocks = ceil_div<i64>(rows, c.block_m);
  s.blocks = p.batch * (p.num_heads / s.group) * s.m_blocks * value_slices(c);
  s.tiles = ceil_div<i64>(visible_keys(p, ceil_div<i64>(min<i64>(rows, c.block_m), s.group)), c.block_n);
  return s;
}

// The fewest splits that keep the processors nearly as busy as the best number does.
i64 splits_of(const Shape& s, const DeviceInfo& device) {
  const i64 per_sm = max<i64>(1, min<i64>(device.smem_per_sm / (smem_bytes(s.config) + 1024), 512 / threads(s.config)));
  const i64 slots = device.sm_count * per_sm;
  if (s.blocks * 5 >= slots * 4) return 1;
  const i64 limit = min(kMaxSplits, s.tiles / 2);
  const auto busy = [&](i64 splits) {
    const i64 blocks = s.blocks * splits, waves = ceil_div(blocks, slots);
    return double(blocks) / double(waves * slots);
  };
  double best = 0;
  for (i64 n = 1; n <= limit; ++n) best = max(best, busy(n));
  for (i64 n = 1; n <= limit; ++n)
    if (busy(n) >= 0.85 * best) return n;
  return 1;
}

bool aligned(const Rows& rows) {
  return reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 && rows.batch_stride % 8 == 0 && rows.row_stride % 8 == 0 &&
         rows.head_stride % 8 == 0;
}

// One dimension of blocks, so that no batch is too large for a grid's second and third.
void set_grid(Launch& launch, i64 blocks) { launch.grid[0] = u32(blocks); }

void add_forward(Plan& plan, const AttnParams& p, const DeviceInfo& device) {
  if (empty(p)) return;
  Shape s = shape_of(p, device);
  const i64 splits = splits_of(s, device);
  s.config.split = splits > 1;
  plan.num_splits = int(splits);
  plan.values[kGroup] = s.group;
  plan.values[kRowBlocks] = s.m_blocks;
  plan.values[kForwardLaunch] = plan.count;
  if (splits > 1) {
    const i64 rows = splits * p.num_heads * p.total_q;
    plan.offsets[kPartialOut] = plan.reserve(rows * p.head_dim_v * i64(sizeof(float)));
    plan.offsets[kPartialState] = plan.reserve(rows * 2 * i64(sizeof(float)));
  }
  Launch& forward = plan.add();
  forward.kernel = kernel_ref(kFwdSm80, s.config);
  set_grid(forward, s.blocks * splits);
  forward.threads = u32(threads(s.config));
  forward.smem = u32(smem_bytes(s.config));
  if (splits > 1) {
    const CombineConfig config = {i32(p.dtype), i32(p.head_dim_v)};
    Launch& combine = plan.add();
    combine.kernel = kernel_ref(kCombine, config);
    set_grid(combine, p.batch * p.num_heads * p.seqlen_q);
    combine.threads = u32(threads(config));
    combine.smem = u32(smem_bytes(config));
  }
}

}  // namespace

bool forward_fits(const AttnParams& p, const DeviceInfo& device) { return empty(p) || shape_of(p, device).fits; }

bool forward_aligned(const AttnParams& p) { return aligned(p.q) && aligned(p.k) && aligned(p.v) && aligned(p.out); }

Plan plan_forward(const AttnParams& p, const DeviceInfo& device) {
  Plan plan;
  add_forward(plan, p, device);
  return plan;
}

void fill_forward(const AttnParams& p, const Plan& plan, void* workspace, LaunchParams& params) {
  if (empty(p)) return;
  char* const base = static_cast<char*>(workspace);
  const bool split = plan.num_splits > 1;
  float* const out = split ? reinterpret_cast<float*>(base + plan.offsets[kPartialOut]) : nullptr;
  float* const state = split ? reinterpret_cast<float*>(base + plan.offsets[kPartialState]) : nullptr;
  const int at = int(plan.values[kForwardLaunch]);
  FwdLaunch& forward = params.emplace<FwdLaunch>(at);
  forward.p = p;
  forward.partial_out = out;
  forward.partial_state = state;
  forward.log2_scale = p.scale * 1.44269504088896340736f;
  forward.page = FastDivisor::of(u32(max<i64>(1, p.page_size)));
  forward.group = FastDivisor::of(u32(plan.values[kGroup]));
  forward.m_blocks = FastDivisor::of(u32(plan.values[kRowBlocks]));
  forward.slices = FastDivisor::of(u32(value_slices(FwdConfig{.head_dim_v = i32(p.head_dim_v)})));
  forward.splits = FastDivisor::of(u32(plan.num_splits));
  forward.groups = FastDivisor::of(u32(p.num_heads / plan.values[kGroup]));
  forward.heads_per_k = FastDivisor::of(u32(p.num_heads / p.num_heads_k));
  forward.heads_per_v = FastDivisor::of(u32(p.num_heads / p.num_heads_v));
  if (split) params.emplace<CombineLaunch>(at + 1) = CombineLaunch::of(p, out, state, plan.num_splits);
}

Plan plan_kvcache(const KVCacheParams& c, const DeviceInfo& device) {
  const AttnParams& p = c.fwd;
  Plan plan;
  const bool appends = c.k_new.data && p.seqlen_new > 0, turns = c.rotary_dim > 0 && !empty(p);
  if (appends || turns) {
    const AppendConfig config = {i32(p.dtype)};
    if (turns) plan.offsets[kTurnedQ] = plan.reserve(p.batch * p.seqlen_q * p.num_heads * p.head_dim * 2);
    const i64 rows = p.batch * ((appends ? p.seqlen_new * (p.num_heads_k + p.num_heads_v) : 0) +
                                (turns ? p.seqlen_q * p.num_heads : 0));
    const i64 per_block = threads(config) / 32;
    if (rows > 0) {
      Launch& append = plan.add();
      append.kernel = kernel_ref(kAppendKV, config);
      set_grid(append, ceil_div(rows, per_block));
      append.threads = u32(threads(config));
    }
  }
  add_forward(plan, p, device);
  return plan;
}

void fill_kvcache(const KVCacheParams& c, const Plan& plan, void* workspace, LaunchParams& params) {
  const bool turns = c.rotary_dim > 0 && !empty(c.fwd);
  void* const q = turns ? static_cast<char*>(workspace) + plan.offsets[kTurnedQ] : nullptr;
  if (plan.count > 0 && plan.launches[0].kernel.source == &kAppendKV) params.emplace<AppendLaunch>(0) = {c, q};
  AttnParams p = c.fwd;
  if (turns) p.q = {q, p.seqlen_q * p.num_heads * p.head_dim, p.num_heads * p.head_dim, p.head_dim};
  fill_forward(p, plan, workspace, params);
}

}  // namespace strobe::host
