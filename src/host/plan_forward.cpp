// Chooses tiles, packing and splits from the problem's shape alone: lengths in device memory are not read.
#include "host/plan_forward.h"

#include "host/plan_split.h"
#include "host/tune.h"

namespace strobe::host {
namespace {

constexpr i64 kPackTokens = 256;  // longer queries fill their tiles without packing

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
  s.group = heads_in_common(p);
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

// Blocks that the GPU runs at once.
i64 slots_of(const FwdConfig& c, const DeviceInfo& device) {
  return device.sm_count * max<i64>(1, min<i64>(device.smem_per_sm / (smem_bytes(c) + 1024), 512 / threads(c)));
}

bool aligned(const Rows& rows) {
  return reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 && rows.batch_stride % 8 == 0 && rows.row_stride % 8 == 0 &&
         rows.head_stride % 8 == 0;
}

}  // namespace

bool forward_fits(const AttnParams& p, const DeviceInfo& device) { return empty(p) || shape_of(p, device).fits; }

bool forward_aligned(const AttnParams& p) { return aligned(p.q) && aligned(p.k) && aligned(p.v) && aligned(p.out); }

void add_forward(Plan& plan, const AttnParams& p, const DeviceInfo& device) {
  if (empty(p)) return;
  Shape s = shape_of(p, device);
  reserve_splits(plan, p, choose_splits(s.blocks, s.tiles / 2, slots_of(s.config, device)));
  s.config.split = plan.num_splits > 1;
  plan.values[kGroup] = s.group;
  plan.values[kRowBlocks] = s.m_blocks;
  plan.values[kForwardAt] = plan.count;
  Launch& forward = plan.add();
  forward.kernel = kernel_ref(kFwdSm80, s.config);
  // One dimension of blocks, so that no batch is too large for a grid's second and third.
  forward.grid[0] = u32(s.blocks * plan.num_splits);
  forward.threads = u32(threads(s.config));
  forward.smem = u32(smem_bytes(s.config));
  add_combine(plan, p, device);
}

Plan plan_forward(const AttnParams& p, const DeviceInfo& device) {
  Plan plan;
  add_forward(plan, p, device);
  return plan;
}

void fill_forward(const AttnParams& p, const Plan& plan, void* workspace, LaunchParams& params) {
  if (empty(p)) return;
  const Partials parts = partials_of(plan, workspace);
  FwdLaunch& forward = params.emplace<FwdLaunch>(int(plan.values[kForwardAt]));
  forward.p = p;
  forward.partial_out = parts.out;
  forward.partial_state = parts.state;
  forward.log2_scale = p.scale * kLog2e;
  forward.page = FastDivisor::of(u32(max<i64>(1, p.page_size)));
  forward.group = FastDivisor::of(u32(plan.values[kGroup]));
  forward.m_blocks = FastDivisor::of(u32(plan.values[kRowBlocks]));
  forward.slices = FastDivisor::of(u32(value_slices(FwdConfig{.head_dim_v = i32(p.head_dim_v)})));
  forward.splits = FastDivisor::of(u32(plan.num_splits));
  forward.groups = FastDivisor::of(u32(p.num_heads / plan.values[kGroup]));
  forward.heads_per_k = FastDivisor::of(u32(p.num_heads / p.num_heads_k));
  forward.heads_per_v = FastDivisor::of(u32(p.num_heads / p.num_heads_v));
  fill_combine(p, plan, workspace, params);
}

}  // namespace strobe::host
