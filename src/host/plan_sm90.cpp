// Chooses tiles, packing and splits from the problem's shape alone: lengths in device memory are not read.
#include "host/plan_sm90.h"

#include <numeric>

#include "host/plan_forward.h"
#include "host/plan_split.h"

namespace strobe::host {
namespace {

constexpr i64 kWarpgroupRows = 64;
constexpr i64 kPackWholeTokens = 4096;   // longer queries fill their tiles without packing, if nothing is masked
constexpr i64 kMostRows = i64(1) << 30;  // the kernel counts them in 32 bits
constexpr i32 kLowRows = 128;            // of a tile, where there are few

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
bool uneven(const AttnParams& p) { return masked(p) || ragged(p); }  // blocks may have different numbers of keys

// `group` rows are a token each.
Sight sight_of(const AttnParams& p, i64 group) {
  const i64 tokens = kWarpgroupRows / group;
  const i64 right = p.causal ? 0 : p.window_right;
  const i32 page = p.page_size ? i32(std::gcd(p.page_size, i64(64))) : 0;
  if (!uneven(p)) return {kEveryKey, 0, tokens, page};
  const bool window = p.window_left >= 0 && p.window_left < p.seqlen_k - 1 && right >= 0 && !p.full_from;
  if (!window) return {kSomeKeys, 0, tokens, page};
  return {kWindow, p.window_left + min(right, p.seqlen_k), tokens, page};
}

struct Shape {
  FwdSm90Config config;
  i64 group, m_blocks, key_tiles, blocks;  // blocks: of all row blocks, heads and sequences, at most
  bool fits;
};

Shape shape_of(const AttnParams& p, const DeviceInfo& device, const FwdSm90Tune* tile = nullptr,
               Supply supply = kManyBlocks) {
  Shape s{};
  FwdSm90Config& c = s.config;
  c.dtype = i32(p.dtype);
  c.head_dim = i32(p.head_dim);
  c.head_dim_v = i32(p.head_dim_v);
  c.packed = p.cu_seqlens_q != nullptr;
  c.softcap = p.softcap != 0.f;
  c.kept = skips(c) && p.window_left >= 0 && p.keep_first > 0 && p.keep_first <= kKeptKeys;
  // A packed tile's queries are one box of (heads, tokens): both are powers of 2.
  s.group = std::gcd(heads_in_common(p), kWarpgroupRows);
  // Where rows see different keys, packed ones, which are of fewer tokens, have fewer tiles to compute and to mask.
  const bool packs = p.seqlen_q <= kPackWholeTokens || uneven(p);
  if (!packs || p.seqlen_q * s.group > kMostRows) s.group = 1;
  c.pack = s.group > 1;
  const i64 rows = p.seqlen_q * s.group, groups = p.num_heads / s.group;
  Sight sight = sight_of(p, s.group);
  sight.supply = supply;
  const auto blocks_of = [&](const FwdSm90Config& config) {
    const i64 all = p.batch * ceil_div<i64>(rows, config.block_m);
    return groups * (c.packed ? min(all, p.total_q * s.group / config.block_m + p.batch) : all);
  };
  s.fits = tile ? set_tile(c, *tile, rows, sight, device.smem_per_block)
                : tune_forward_sm90(c, rows, sight, device.smem_per_block);
  if (!s.fits) return s;
  // Tall tiles compute faster, but few of them leave processors idle.
  FwdSm90Config low = c;
  const auto busy_with = [&](const FwdSm90Config& config) {
    const i64 blocks = blocks_of(config);
    // The longest first, of which one has twice the mean's work.
    return uneven(p) ? min(1., double(blocks) / double(2 * device.sm_count)) : busy(blocks, device.sm_count);
  };
  if (!tile && c.block_m > kLowRows && busy_with(c) < 0.95 &&
      tune_forward_sm90(low, rows, sight, device.smem_per_block, kLowRows) &&
      busy_with(low) > busy_with(c) * (1 + 0.05 * (consumers(c) - consumers(low))))
    c = low;
  s.m_blocks = ceil_div<i64>(rows, c.block_m);
  s.blocks = blocks_of(c);
  if (device.sm_count < 2) c.cluster = 1;
  s.key_tiles = ceil_div<i64>(visible_keys(p, ceil_div<i64>(min<i64>(rows, c.block_m), s.group)), c.block_n);
  return s;
}

// The mean of a row's visible keys, as a share of a sequence's: half of them where rows are causal.
double share_of_keys(const AttnParams& p) {
  if (ragged(p) || !p.causal || p.window_left >= 0 || p.seqlen_k < p.seqlen_q) return 1;
  return 1 - double(p.seqlen_q) / double(2 * p.seqlen_k);
}

// Of costs, which are multiplications of one multiprocessor, fitted to what 1 to 8 heads of 1024 to 4096 tokens take
// (docs/hopper-forward.md): a block's start.
constexpr double kStartPart = 5e6;

// One row's multiplications with a key, times the rows of a block.
double key_cost(const AttnParams& p, const Shape& s) {
  return double(s.config.block_m) * double(p.head_dim + p.head_dim_v);
}

struct Splits {
  i64 parts;
  double cost;  // 0: there are blocks enough, or rows so few that only filling the GPU counts
};

// Few rows: parts fill the GPU. Prompts: the number that costs least.
Splits splits_of(const AttnParams& p, const Shape& s, const DeviceInfo& device) {
  const i64 keys = s.key_tiles * s.config.block_n, slots = device.sm_count;
  if (s.config.block_m == kWarpgroupRows) {
    constexpr i64 kFewestKeys = 256;  // of a part: fewer cost more to write and to merge than they save
    return {choose_splits(s.blocks, keys / kFewestKeys, slots), 0};
  }
  constexpr double kStartMerge = 11e6, kMergeRow = 2, kMergeRowAlone = 64;
  const double share = share_of_keys(p), key = key_cost(p, s);
  if (share < 1 ? double(s.blocks) * share >= double(slots) : fills(s.blocks, slots)) return {1, 0};
  const auto cost = [&](i64 n) {
    const double part = double(ceil_div(keys, n)), waves = double(ceil_div(s.blocks * n, slots));
    // Uneven parts are dealt out the longest first: a triangle's fill the waves, those of a short query's are alike.
    const double alike = 2 * share - 1, mean = double(s.blocks) * double(keys) * share / double(slots);
    const double most = alike * part * waves + (1 - alike) * max(part, mean);
    const double merging = kMergeRow * double(n + 1) + (n > kFewParts ? kMergeRowAlone : 0);
    const double merge = kStartMerge + merging * double(p.num_heads * p.total_q * p.head_dim_v);
    return most * key + waves * kStartPart + (n > 1 ? merge : 0);
  };
  Splits best = {1, cost(1)};
  for (i64 n = 2; n <= min(s.key_tiles, kMaxSplits); ++n)
    if (const double c = cost(n); c < best.cost) best = {n, c};
  return best;
}

struct Work {
  Shape shape;
  i64 splits;
};

// Where there are fewer blocks than processors, blocks of one consumer may end sooner than parts of higher ones: they
// have half the work and nothing to merge, but wait for their own exponentials. Parts are short: small tiles suit them.
Work work_of(const AttnParams& p, const DeviceInfo& device, const FwdSm90Tune* tile) {
  constexpr double kWaits = 1.6;
  const Shape s = shape_of(p, device, tile);
  const Splits splits = splits_of(p, s, device);
  if (tile || splits.cost == 0) return {s, splits.parts};
  const Shape lone = shape_of(p, device, tile, kFewBlocks);
  const double keys = double(lone.key_tiles * lone.config.block_n);
  if (lone.config.block_m == kWarpgroupRows && lone.blocks <= device.sm_count &&
      keys * key_cost(p, lone) * kWaits + kStartPart < splits.cost)
    return {lone, 1};
  return {splits.parts > 1 ? shape_of(p, device, tile, kSplitKeys) : s, splits.parts};
}

// Groups of heads whose row blocks are dealt out together, the longest first: as many as share the L2 cache with their
// K and V, and at least so many that kBlocksSharing blocks work on each at a time, which share its tiles as they come.
// The last section must not be much smaller than the others: its few heads would not fill the GPU to the end.
i64 section_of(const AttnParams& p, const Shape& s, const DeviceInfo& device) {
  const i64 all = p.batch * (p.num_heads / s.group), sharing = p.num_heads / p.num_heads_k / s.group;
  const i64 bytes = max<i64>(1, p.seqlen_k * (p.head_dim + p.head_dim_v) * 2);
  constexpr i64 kBlocksSharing = 16;
  const i64 together = max<i64>(1, max(device.l2_bytes * 7 / 10 / bytes, device.sm_count / kBlocksSharing));
  const i64 fit = together * max<i64>(1, sharing);
  const i64 fewest = fit / 2 + 1;
  i64 section = min(all, fit);
  while (section > fewest && ((all - 1) % section + 1) * 4 < section * 3) {
    // The largest whose last one holds 3/4 of it, if there are as many of them, and else one of more sections.
    section = max(fewest, min(section - 1, all * 4 / (ceil_div(all, section) * 4 - 1)));
  }
  return section;
}

// Sequences with more keys than this are dealt out first. Every block looks at all of them once for each class of
// lengths, which many sequences would not repay: they fill the end of the work anyway.
i64 long_keys(const AttnParams& p) {
  constexpr i64 kManySequences = 512;
  return p.batch <= kManySequences ? p.seqlen_k / 2 : -1;
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
  if (max(max(p.seqlen_q, p.seqlen_k), max(p.cu_seqlens_q ? p.total_q : 0, p.total_k)) >= kUnbounded32)
    return "a sequence may have 2^29 queries or keys, or more";
  const KeyRows keys = key_rows(p);
  if (keys.rows == 0 || keys.batches == 0) return "there are no keys";
  const i64 q_rows = p.cu_seqlens_q ? p.total_q : p.seqlen_q, q_batches = p.cu_seqlens_q ? 1 : p.batch;
  if (!copyable(p.q, q_rows, p.num_heads, q_batches) || !copyable(p.k, keys.rows, p.num_heads_k, keys.batches) ||
      !copyable(p.v, keys.rows, p.num_heads_v, keys.batches) || !copyable(p.out, q_rows, p.num_heads, q_batches) ||
      !forward_aligned(p))
    return "a tensor's start or strides are no positive multiples of 16 bytes";
  if (!empty(p) && !shape_of(p, device).fits) return "no tile fits these head_dims";
  return nullptr;
}

// Measured on an H200 (docs/hopper-forward.md). Where more than kReadRows query rows share their keys, sm80 multiplies
// for longer than it reads, and sm90 takes down to 0.4 of its time. Below, both read as fast as the memory allows, and
// what counts is how blocks fill the GPU. One block a processor, none of them split, or split into long parts: sm90 is
// up to 20 % faster. More blocks, or short parts: the smaller blocks of sm80 leave less of the GPU idle, 2 to 12 %.
bool prefers_sm90(const AttnParams& p, const DeviceInfo& device) {
  constexpr i64 kReadRows = 32, kLongKeys = 32768, kFewKeys = 128, kTinyBytes = 16384;
  if (empty(p)) return false;
  const Shape s = shape_of(p, device);
  const i64 rows = p.seqlen_q * s.group, keys = visible_keys(p, p.seqlen_q);
  const bool one_wave = s.blocks <= device.sm_count;
  if (rows <= kReadRows) {
    if (keys <= kFewKeys) return false;  // there is nothing to gain, and tensor maps take time of the host
    return one_wave && (keys >= kLongKeys || splits_of(p, s, device).parts == 1);
  }
  // Row blocks with a tile of keys each cost what starting them costs.
  return one_wave || rows > kWarpgroupRows || keys * (p.head_dim + p.head_dim_v) * 2 > kTinyBytes;
}

void add_forward_sm90(Plan& plan, const AttnParams& p, const DeviceInfo& device, const FwdSm90Tune* tile) {
  if (empty(p)) return;
  auto [s, splits] = work_of(p, device, tile);
  reserve_splits(plan, p, splits);
  s.config.split = plan.num_splits > 1;
  if (s.config.split) {  // parts are long, and registers few
    s.config.stages_q = s.config.cluster = 1;
    s.config.staging = kFromRegisters;
  }
  const i64 cluster = s.config.cluster, tiles = s.blocks * plan.num_splits / cluster;
  const i64 clusters = min<i64>(tiles, device.sm_count / cluster);
  plan.values[kGroup] = s.group;
  plan.values[kRowBlocks] = s.m_blocks / cluster;
  plan.values[kSection] = masked(p) ? section_of(p, s, device) : 1;
  plan.values[kTiles] = tiles;
  plan.values[kDynamic] = uneven(p) && tiles > clusters;
  plan.values[kForwardAt] = plan.count;
  if (plan.values[kDynamic]) {
    plan.offsets[kCounter] = plan.reserve(i64(sizeof(u32)));
    plan.zero_bytes = i64(sizeof(u32));
  }
  Launch& forward = plan.add();
  forward.kernel = kernel_ref(kFwdSm90, s.config);
  forward.grid[0] = u32(clusters * cluster);
  forward.threads = u32(threads(s.config));
  forward.smem = u32(smem_bytes(s.config));
  forward.cluster = u32(cluster);
  add_combine(plan, p, device);
}

Plan plan_forward_sm90(const AttnParams& p, const DeviceInfo& device, const FwdSm90Tune* tile) {
  Plan plan;
  add_forward_sm90(plan, p, device, tile);
  return plan;
}

void fill_forward_sm90(const AttnParams& p, const Plan& plan, void* workspace, LaunchParams& params) {
  if (empty(p)) return;
  const Partials parts = partials_of(plan, workspace);
  const int at = int(plan.values[kForwardAt]);
  const FwdSm90Config c = config_of<FwdSm90Config>(plan.launches[at].kernel);
  const i64 group = plan.values[kGroup], groups = p.num_heads / group, section = plan.values[kSection];
  const KeyRows keys = key_rows(p);

  FwdSm90Launch& forward = params.emplace<FwdSm90Launch>(at);
  forward.p = p;
  forward.partial_out = parts.out;
  forward.partial_state = parts.state;
  if (plan.values[kDynamic]) {
    params.zero = static_cast<char*>(workspace) + plan.offsets[kCounter];
    forward.counter = static_cast<u32*>(params.zero);
  }
  forward.page = FastDivisor::of(u32(max<i64>(1, p.page_size)));
  forward.group = FastDivisor::of(u32(group));
  forward.heads_per_k = FastDivisor::of(u32(p.num_heads / p.num_heads_k));
  forward.heads_per_v = FastDivisor::of(u32(p.num_heads / p.num_heads_v));
  forward.splits = plan.num_splits;
  forward.m_blocks = i32(plan.values[kRowBlocks]);
  forward.section = i32(section);
  forward.groups = i32(groups);
  forward.tiles = i32(plan.values[kTiles]);
  forward.long_keys = c.packed ? i32(long_keys(p)) : -1;
  forward.rows_k = i32(keys.rows);

  const i64 q_rows = p.cu_seqlens_q ? p.total_q : p.seqlen_q, q_batches = p.cu_seqlens_q ? 1 : p.batch;
  const auto add_rows = [&](TensorMap& map, const Rows& rows, i64 dim, i64 count) {
    const i64 heads = min(group, count);
    add_box(params, map, p, rows, dim, {p.num_heads, q_rows, q_batches},
            {rows.head_stride, rows.row_stride, rows.batch_stride}, {u32(heads), u32(count / heads)});
  };
  add_rows(forward.q, p.q, p.head_dim, kWarpgroupRows);
  const u32 rows = u32(c.paged ? c.paged : c.block_n);
  add_box(params, forward.k, p, p.k, p.head_dim, {keys.rows, p.num_heads_k, keys.batches},
          {p.k.row_stride, p.k.head_stride, p.k.batch_stride}, {rows, 1});
  add_box(params, forward.v, p, p.v, p.head_dim_v, {keys.rows, p.num_heads_v, keys.batches},
          {p.v.row_stride, p.v.head_stride, p.v.batch_stride}, {rows, 1});
  if (c.staging != kFromRegisters) add_rows(forward.out, p.out, p.head_dim_v, kStagedRows);
  fill_combine(p, plan, workspace, params);
}

}  // namespace strobe::host
