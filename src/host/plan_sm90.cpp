// Chooses tiles, packing and splits from the problem's shape alone: lengths in device memory are not read.
#include "host/plan_sm90.h"

#include "host/plan_forward.h"

namespace strobe::host {
namespace {

// What a Plan's offsets and values hold.
enum Offset { kPartialOut, kPartialState, kCounter };
enum Value { kGroup, kMBlocks, kSection, kTiles, kDynamic };

constexpr i64 kMaxSplits = 128;
constexpr i64 kPackTokens = 256;  // longer queries fill their tiles without packing
constexpr i64 kWarpgroupRows = 64;

i64 gcd(i64 a, i64 b) {
  while (b != 0) {
    const i64 rest = a % b;
    a = b;
    b = rest;
  }
  return a;
}

bool empty(const AttnParams& p) { return p.batch == 0 || p.num_heads == 0 || p.seqlen_q == 0 || p.total_q == 0; }

// Whether tensor copies can read a tensor with these sizes: they take strides that are multiples of 16 bytes.
bool copyable(const Rows& rows, i64 count, i64 heads, i64 batches) {
  const auto fits = [](i64 stride, i64 size) {
    return size <= 1 || (stride > 0 && stride % 8 == 0 && stride < (i64(1) << 39));
  };
  return reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 && fits(rows.row_stride, count) &&
         fits(rows.head_stride, heads) && fits(rows.batch_stride, batches);
}

struct KeyRows {
  i64 rows, batches;  // of a batch entry or page, and how many there are
};
KeyRows key_rows(const AttnParams& p) {
  if (p.page_size) return {p.page_size, p.num_pages};
  if (p.cu_seqlens_k) return {p.total_k, 1};
  return {p.seqlen_k, p.cache_batch_idx ? p.cache_rows : p.batch};
}

bool masked(const AttnParams& p) { return p.causal || p.window_left >= 0 || p.window_right >= 0; }
bool ragged(const AttnParams& p) { return p.cu_seqlens_q || p.cu_seqlens_k || p.seqused_q || p.seqused_k; }

// Keys that a row block of `tokens` queries can see at most.
i64 visible_keys(const AttnParams& p, i64 tokens) {
  const bool unbounded = p.window_left < 0 || p.full_from || (p.force_fa_decode && p.seqlen_q == 1);
  if (unbounded) return p.seqlen_k;
  const i64 right = p.causal ? 0 : p.window_right < 0 ? p.seqlen_k : p.window_right;
  return min(p.seqlen_k,
             min(p.keep_first, p.seqlen_k) + min(p.window_left, p.seqlen_k) + min(right, p.seqlen_k) + tokens);
}

struct Shape {
  FwdSm90Config config;
  i64 group, m_blocks, key_tiles, blocks;  // blocks: of all row blocks, heads and sequences, at most
  bool fits;
};

Shape shape_of(const AttnParams& p, const DeviceInfo& device, const FwdSm90Tune* tile = nullptr) {
  Shape s{};
  FwdSm90Config& c = s.config;
  c.dtype = i32(p.dtype);
  c.head_dim = i32(p.head_dim);
  c.head_dim_v = i32(p.head_dim_v);
  c.packed = p.cu_seqlens_q != nullptr;
  c.paged = p.page_size ? i32(gcd(p.page_size, 64)) : 0;
  c.softcap = p.softcap != 0.f;
  // A packed tile's queries are one box of (heads, tokens): both are powers of 2.
  s.group = gcd(gcd(p.num_heads / p.num_heads_k, p.num_heads / p.num_heads_v), kWarpgroupRows);
  if (p.seqlen_q > kPackTokens) s.group = 1;
  c.pack = s.group > 1;
  const i64 rows = p.seqlen_q * s.group;
  s.fits = tile ? set_tile(c, *tile, device.smem_per_block)
                : tune_forward_sm90(c, rows, masked(p) || ragged(p), device.smem_per_block);
  if (!s.fits) return s;
  s.m_blocks = ceil_div<i64>(rows, c.block_m);
  const i64 groups = p.num_heads / s.group;
  s.blocks =
      groups * (c.packed ? min(p.batch * s.m_blocks, p.total_q * s.group / c.block_m + p.batch) : p.batch * s.m_blocks);
  s.key_tiles = ceil_div<i64>(visible_keys(p, ceil_div<i64>(min<i64>(rows, c.block_m), s.group)), c.block_n);
  return s;
}

// The fewest splits that keep the processors nearly as busy as the best number does.
i64 splits_of(const Shape& s, const DeviceInfo& device) {
  const i64 slots = device.sm_count;
  if (s.blocks * 5 >= slots * 4) return 1;
  const i64 limit = min(kMaxSplits, s.key_tiles / 2);
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

// Groups of heads whose row blocks are dealt out together: as many as share the L2 cache with their K and V, the same
// number in each section.
i64 section_of(const AttnParams& p, const Shape& s, const DeviceInfo& device) {
  const i64 all = p.batch * (p.num_heads / s.group), sharing = p.num_heads / p.num_heads_k / s.group;
  const i64 bytes = max<i64>(1, p.seqlen_k * (p.head_dim + p.head_dim_v) * 2);
  const i64 fit = max<i64>(1, device.l2_bytes * 7 / 10 / bytes) * max<i64>(1, sharing);
  return ceil_div(all, ceil_div(all, fit));
}

// Dimensions of size 1 may have any stride: the driver wants one that it would take.
u64 stride_bytes(i64 stride, i64 size) { return size <= 1 ? 16 : u64(stride) * 2; }

void add_box(LaunchParams& params, TensorMap& map, const AttnParams& p, const Rows& rows, i64 dim,
             const i64 (&sizes)[3], const i64 (&strides)[3], const u32 (&box)[2]) {
  TensorBox& b = params.boxes[params.box_count++];
  b = {&map, rows.data, {u64(dim)}, {}, {u32(kWarpgroupRows), box[0], box[1], 1}, p.dtype};
  for (int i = 0; i < 3; ++i) {
    b.dims[i + 1] = u64(sizes[i]);
    b.strides[i] = stride_bytes(strides[i], sizes[i]);
  }
}

}  // namespace

const char* refusal_sm90(const AttnParams& p, const DeviceInfo& device) {
  if (device.arch != 90) return "the GPU is not of compute capability 9.0";
  if (p.dtype != DType::f16 && p.dtype != DType::bf16) return "the dtype is neither float16 nor bfloat16";
  if (p.head_dim % 8 || p.head_dim_v % 8) return "a head_dim is no multiple of 8";
  if (p.head_dim > 256 || p.head_dim_v > 256) return "a head_dim is larger than 256";
  if (p.dropout_p > 0.f) return "dropout_p is not 0";
  if (p.alibi_slopes) return "alibi_slopes are given";
  if (!(p.scale > 0.f)) return "softmax_scale is not positive";
  if (p.page_size % 8) return "the page size is no multiple of 8";
  if (p.page_size && p.leftpad_k) return "leftpad_k is given with a page_table";
  const KeyRows keys = key_rows(p);
  if (keys.rows == 0 || keys.batches == 0) return "there are no keys";
  const i64 q_rows = p.cu_seqlens_q ? p.total_q : p.seqlen_q, q_batches = p.cu_seqlens_q ? 1 : p.batch;
  if (!copyable(p.q, q_rows, p.num_heads, q_batches) || !copyable(p.k, keys.rows, p.num_heads_k, keys.batches) ||
      !copyable(p.v, keys.rows, p.num_heads_v, keys.batches) || !forward_aligned(p))
    return "a tensor's start or strides are no positive multiples of 16 bytes";
  if (!empty(p) && !shape_of(p, device).fits) return "no tile fits these head_dims";
  return nullptr;
}

bool prefers_sm90(const AttnParams& p, const DeviceInfo&) { return p.seqlen_q > kPackTokens; }

Plan plan_forward_sm90(const AttnParams& p, const DeviceInfo& device, const FwdSm90Tune* tile) {
  Plan plan;
  if (empty(p)) return plan;
  Shape s = shape_of(p, device, tile);
  const i64 splits = splits_of(s, device), tiles = s.blocks * splits;
  s.config.split = splits > 1;
  plan.num_splits = int(splits);
  const bool uneven = masked(p) || ragged(p);
  const i64 grid = min<i64>(tiles, device.sm_count);
  plan.values[kGroup] = s.group;
  plan.values[kMBlocks] = s.m_blocks;
  plan.values[kSection] = uneven ? section_of(p, s, device) : 1;
  plan.values[kTiles] = tiles;
  plan.values[kDynamic] = uneven && tiles > grid;
  if (splits > 1) {
    const i64 rows = splits * p.num_heads * p.total_q;
    plan.offsets[kPartialOut] = plan.reserve(rows * p.head_dim_v * i64(sizeof(float)));
    plan.offsets[kPartialState] = plan.reserve(rows * 2 * i64(sizeof(float)));
  }
  if (plan.values[kDynamic]) {
    plan.offsets[kCounter] = plan.zero_offset = plan.reserve(i64(sizeof(u32)));
    plan.zero_bytes = i64(sizeof(u32));
  }
  Launch& forward = plan.add();
  forward.kernel = kernel_ref(kFwdSm90, s.config);
  forward.grid[0] = u32(grid);
  forward.threads = u32(threads(s.config));
  forward.smem = u32(smem_bytes(s.config));
  if (splits > 1) {
    const CombineConfig config = {i32(p.dtype), i32(p.head_dim_v)};
    Launch& combine = plan.add();
    combine.kernel = kernel_ref(kCombine, config);
    combine.grid[0] = u32(p.batch * p.num_heads * p.seqlen_q);
    combine.threads = u32(threads(config));
    combine.smem = u32(smem_bytes(config));
  }
  return plan;
}

void fill_forward_sm90(const AttnParams& p, const Plan& plan, void* workspace, LaunchParams& params) {
  if (empty(p)) return;
  char* const base = static_cast<char*>(workspace);
  const bool split = plan.num_splits > 1;
  float* const out = split ? reinterpret_cast<float*>(base + plan.offsets[kPartialOut]) : nullptr;
  float* const state = split ? reinterpret_cast<float*>(base + plan.offsets[kPartialState]) : nullptr;
  FwdSm90Config c;
  static_assert(sizeof c == sizeof(i32) * 12);
  std::memcpy(&c, plan.launches[0].kernel.values, sizeof c);
  const i64 group = plan.values[kGroup], groups = p.num_heads / group, section = plan.values[kSection];
  const KeyRows keys = key_rows(p);

  FwdSm90Launch& forward = params.emplace<FwdSm90Launch>(0);
  forward.p = p;
  forward.partial_out = out;
  forward.partial_state = state;
  forward.counter = plan.values[kDynamic] ? reinterpret_cast<u32*>(base + plan.offsets[kCounter]) : nullptr;
  if (plan.zero_bytes) params.zero = base + plan.zero_offset;
  forward.page = FastDivisor::of(u32(max<i64>(1, p.page_size)));
  forward.group = FastDivisor::of(u32(group));
  forward.heads_per_k = FastDivisor::of(u32(p.num_heads / p.num_heads_k));
  forward.heads_per_v = FastDivisor::of(u32(p.num_heads / p.num_heads_v));
  forward.splits = plan.num_splits;
  forward.m_blocks = i32(plan.values[kMBlocks]);
  forward.section = i32(section);
  forward.groups = i32(groups);
  forward.tiles = i32(plan.values[kTiles]);
  forward.rows_k = i32(keys.rows);

  const i64 q_rows = p.cu_seqlens_q ? p.total_q : p.seqlen_q, q_batches = p.cu_seqlens_q ? 1 : p.batch;
  add_box(params, forward.q, p, p.q, p.head_dim, {p.num_heads, q_rows, q_batches},
          {p.q.head_stride, p.q.row_stride, p.q.batch_stride}, {u32(group), u32(kWarpgroupRows / group)});
  const u32 rows = u32(c.paged ? c.paged : c.block_n);
  add_box(params, forward.k, p, p.k, p.head_dim, {keys.rows, p.num_heads_k, keys.batches},
          {p.k.row_stride, p.k.head_stride, p.k.batch_stride}, {rows, 1});
  add_box(params, forward.v, p, p.v, p.head_dim_v, {keys.rows, p.num_heads_v, keys.batches},
          {p.v.row_stride, p.v.head_stride, p.v.batch_stride}, {rows, 1});
  if (split) params.emplace<CombineLaunch>(1) = CombineLaunch::of(p, out, state, plan.num_splits);
}

}  // namespace strobe::host
