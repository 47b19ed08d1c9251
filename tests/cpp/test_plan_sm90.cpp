// Plans of the engine sm90, without a GPU: which calls it takes, that what is launched fits the device, and that the
// parameter block, the tensor maps and the workspace agree.
#include <cstdio>
#include <string>
#include <utility>

#include "core/launch_sm90.h"
#include "host/cuda_engine.h"
#include "host/device.h"
#include "host/jit.h"
#include "host/plan_append.h"
#include "host/plan_forward.h"
#include "host/plan_sm90.h"
#include "host/plan_split.h"
#include "host/problem.h"
#include "host/tune_sm90.h"

namespace {

using namespace strobe::host;
using strobe::AttnParams;
using strobe::DType;
using strobe::Engine;
using strobe::FwdSm90Config;
using strobe::FwdSm90Launch;
using strobe::i32;
using strobe::i64;
using strobe::u32;
using strobe::u64;

long passed = 0, failed = 0;

void expect(bool held, const char* what, const std::string& call) {
  held ? ++passed : ++failed;
  if (!held && failed < 20) std::printf("FAILED %s: %s\n", what, call.c_str());
}

alignas(256) char memory[4096];

AttnParams dense(i64 batch, i64 seqlen_q, i64 seqlen_k, i64 heads, i64 heads_kv, i64 dim, i64 dim_v) {
  AttnParams p;
  p.dtype = DType::bf16;
  p.batch = batch, p.seqlen_q = seqlen_q, p.seqlen_k = seqlen_k, p.total_q = batch * seqlen_q;
  p.num_heads = heads, p.num_heads_k = p.num_heads_v = heads_kv, p.head_dim = dim, p.head_dim_v = dim_v;
  p.scale = 0.125f;
  const auto rows = [](i64 length, i64 count, i64 width) {
    return strobe::Rows{memory, length * count * width, count * width, width};
  };
  p.q = rows(seqlen_q, heads, dim);
  p.k = rows(seqlen_k, heads_kv, dim);
  p.v = rows(seqlen_k, heads_kv, dim_v);
  p.out = rows(seqlen_q, heads, dim_v);
  return p;
}

void pack_sequences(AttnParams& p, i64 total_k) {
  p.cu_seqlens_q = p.cu_seqlens_k = reinterpret_cast<const i32*>(memory);
  p.total_k = total_k;
  p.q.batch_stride = p.k.batch_stride = p.v.batch_stride = p.out.batch_stride = 0;
}

// The keys of every sequence lie in pages, and their number on the device.
void put_in_pages(AttnParams& p, i64 page) {
  p.page_size = page, p.max_pages = p.page_table_stride = p.seqlen_k / page, p.num_pages = p.batch * p.max_pages;
  p.page_table = p.seqused_k = reinterpret_cast<const i32*>(memory);
}

FwdSm90Config config_of(const Plan& plan) { return config_of<FwdSm90Config>(plan.launches[0].kernel); }

// What holds for every plan of this engine.
void check(const AttnParams& p, const std::string& call) {
  const DeviceInfo device = typical_device(90);
  const char* const refusal = refusal_sm90(p, device);
  expect(refusal == nullptr, refusal ? refusal : "", call);
  if (refusal) return;
  const Plan plan = plan_forward_sm90(p, device);
  const FwdSm90Config c = config_of(plan);
  expect(valid(c), "a valid Config", call);
  const Launch& l = plan.launches[0];
  expect(i64(l.smem) == smem_bytes(c) && smem_bytes(c) <= device.smem_per_block, "shared memory", call);
  expect(l.threads == u32(threads(c)), "threads", call);
  const bool few_kept = p.window_left >= 0 && p.keep_first >= 1 && p.keep_first <= 16;
  expect((c.kept != 0) == (few_kept && c.head_dim_v <= 192), "a step for a few kept tokens", call);
  expect(l.grid[0] >= 1 && l.grid[0] <= u32(device.sm_count), "a persistent grid", call);
  const i64 pool = 128 * (producer_registers(c) + consumers(c) * consumer_registers(c));
  expect(consumers(c) == 1 || pool <= 65536, "registers that are dealt out exist", call);

  alignas(256) static char workspace[256];
  LaunchParams blocks;
  fill_forward_sm90(p, plan, workspace, blocks);
  const auto* forward = reinterpret_cast<const FwdSm90Launch*>(blocks.blocks[0]);
  const i64 group = forward->group.divisor;
  expect(64 % group == 0 && (group > 1) == (c.pack != 0), "packed heads divide a warpgroup's rows", call);
  expect(i64(forward->groups) * group == p.num_heads, "every head has a group", call);
  expect(i64(forward->m_blocks) * c.cluster * c.block_m >= p.seqlen_q * group, "row blocks cover the rows", call);
  expect(l.cluster == u32(c.cluster) && l.grid[0] % l.cluster == 0, "whole clusters", call);
  const bool alike = !p.causal && p.window_left < 0 && p.window_right < 0 && !p.cu_seqlens_q && !p.seqused_k;
  expect(c.cluster == 1 || alike, "both blocks of a cluster see the same keys", call);
  if (!c.packed) {
    const i64 tiles = p.batch * forward->groups * forward->m_blocks * plan.num_splits;
    expect(forward->tiles == tiles, "every tile is dealt out", call);
    expect(forward->section >= 1 && i64(l.grid[0]) <= tiles * c.cluster, "sections and grid", call);
    const i64 all = p.batch * forward->groups, last = (all - 1) % forward->section + 1;
    expect(!forward->counter || all < 8 || last * 2 >= forward->section, "the last section is no remnant", call);
    expect(forward->long_keys == -1, "fixed lengths have no classes", call);
  } else {
    expect(forward->long_keys < p.seqlen_k, "the longest sequence has a class", call);
  }
  expect((forward->counter != nullptr) == (plan.zero_bytes > 0), "a counter is cleared before the kernel", call);
  expect(!forward->counter || (blocks.zero == forward->counter && plan.zero_bytes >= i64(sizeof(u32))),
         "what is cleared is the counter", call);
  expect(blocks.box_count == 3 + (c.staging != strobe::kFromRegisters),
         "tensor maps of q, k, v, and of out where rows are staged", call);
  for (int i = 0; i < blocks.box_count; ++i) {
    const TensorBox& b = blocks.boxes[i];
    expect(reinterpret_cast<uintptr_t>(b.map) % 64 == 0, "a map is aligned", call);
    for (u64 stride : b.strides) expect(stride > 0 && stride % 16 == 0, "strides that copies take", call);
    for (u32 size : b.box) expect(size >= 1 && size <= 256, "sizes that copies take", call);
    for (u64 size : b.dims) expect(size >= 1, "no empty dimension", call);
    expect(b.box[1] * b.box[2] % 8 == 0, "a box is whole groups of 8 rows", call);
  }
  const TensorBox& keys = blocks.boxes[1];
  expect(keys.box[1] == u32(c.paged ? c.paged : c.block_n), "a box of keys is a tile or divides a page", call);
  if (c.split) {
    const auto* combine = reinterpret_cast<const strobe::CombineLaunch*>(blocks.blocks[1]);
    expect(plan.count == 2 && combine->num_splits == plan.num_splits && forward->splits == plan.num_splits,
           "both kernels know the splits", call);
  } else {
    expect(plan.count == 1, "one kernel", call);
  }
}

void test_every_shape() {
  for (i64 dim = 8; dim <= 256; dim += 24) {
    for (i64 dim_v = 8; dim_v <= 256; dim_v += 8) {
      for (int mask = 0; mask < 3; ++mask) {
        AttnParams p = dense(2, mask ? 300 : 40, 777, 12, 4, dim, dim_v);
        p.causal = mask == 1;
        if (mask == 2) pack_sequences(p, 1000);
        check(p, "dims " + std::to_string(dim) + ", " + std::to_string(dim_v) + " mask " + std::to_string(mask));
      }
    }
  }
  for (i64 page : {8, 16, 24, 64, 256, 1000}) {
    AttnParams p = dense(3, 1, page * 7, 8, 2, 128, 128);
    put_in_pages(p, page);
    check(p, "pages of " + std::to_string(page));
  }
  for (i64 heads : {1, 3, 16, 17, 64}) {
    for (i64 length : {300, 2049, 16384}) {
      AttnParams p = dense(1, length, length, heads * 4, heads, 192, 128);
      p.causal = true;
      check(p, "shared heads " + std::to_string(heads) + " length " + std::to_string(length));
      pack_sequences(p, length * 3);
      check(p, "packed sequences, shared heads " + std::to_string(heads) + " length " + std::to_string(length));
      p = dense(1, length, length, heads, heads, 64, 64);
      p.window_left = length / 2;
      check(p, "windows, heads " + std::to_string(heads) + " length " + std::to_string(length));
      for (i64 kept : {1, 16, 17}) {
        p.keep_first = kept;
        check(p, "windows and " + std::to_string(kept) + " kept tokens, heads " + std::to_string(heads));
      }
    }
  }
  AttnParams wide = dense(2, 4096, 4096, 8, 8, 128, 256);
  wide.window_left = 500, wide.keep_first = 4;
  check(wide, "windows and 4 kept tokens, wide");
  check(dense(1, 1, 1, 1, 1, 8, 8), "one pair");
  check(dense(1, 16384, 16384, 16, 16, 128, 128), "one long sequence");
}

// Heads that share keys share tiles where that saves keys, or rows.
void test_packing() {
  const auto group_of = [](i64 length, i64 left, bool causal) {
    AttnParams p = dense(1, length, length, 32, 4, 128, 128);
    p.window_left = left, p.causal = causal;
    const Plan plan = plan_forward_sm90(p, typical_device(90));
    expect(plan.values[kRowBlocks] * config_of(plan).block_m >= length * plan.values[kGroup], "rows", "packed");
    return plan.values[kGroup];
  };
  expect(group_of(16384, -1, true) == 8, "causal", "packing");
  expect(group_of(16384, 1000, false) == 8, "window", "packing");
  expect(group_of(1024, -1, false) == 8, "short", "packing");
  expect(group_of(16384, -1, false) == 1, "long, and nothing is masked", "packing");
}

// The engine's own tiles fit every pair of dims that the table says they serve.
void test_tiles() {
  for (const FwdSm90Tune& row : kFwdSm90Tune) {
    FwdSm90Config c = {i32(DType::bf16), row.max_dim, row.max_dim_v};
    const i32 page = row.masking == kPages ? 16 : row.masking == kWholePages ? 64 : 0;
    const bool every = row.masking == kPairs || row.masking == kFilled;
    const Supply supply = row.masking == kParts ? kSplitKeys : row.masking == kLone ? kFewBlocks : kManyBlocks;
    const Sight sight = {every ? kEveryKey : Masking(row.masking), 0, 64, page, supply};
    expect(meant(row, 2 * row.block_m, sight) &&
               set_tile(c, row, 2 * row.block_m, sight, typical_device(90).smem_per_block) &&
               c.staging == row.staging && c.stages_q == row.stages_q && (c.cluster == 2) == (row.masking == kPairs),
           "a row of the table fits, as it is",
           "dims " + std::to_string(row.max_dim) + ", " + std::to_string(row.max_dim_v));
  }
}

void test_refusals() {
  const auto says = [](AttnParams p, const char* text, int arch = 90) {
    p.engine = Engine::sm90;
    std::string given;
    try {
      strobe::cuda::plan(p, typical_device(arch));
    } catch (const strobe::Error& error) {
      given = error.what();
    }
    expect(given.find(text) != std::string::npos, text, "'" + given + "'");
  };
  const AttnParams good = dense(1, 512, 512, 4, 4, 64, 64);
  AttnParams p = good;
  says(good, "the GPU is not of compute capability 9.0", 80);
  says(good, "the GPU is not of compute capability 9.0", 120);
  p.dropout_p = 0.5f;
  says(p, "dropout_p is not 0");
  p = good, p.alibi_slopes = reinterpret_cast<const float*>(memory);
  says(p, "alibi_slopes are given");
  p = good, p.scale = -1.f;
  says(p, "softmax_scale is not positive");
  p = good, p.k.row_stride += 4;
  says(p, "strides");
  p = good, p.v.head_stride = 0;
  says(p, "strides");
  p = dense(1, 512, 512, 4, 4, 264, 64);
  says(p, "larger than 256");
  p = dense(1, 512, strobe::kUnbounded32, 4, 4, 64, 64);
  says(p, "2^29 queries or keys");
  p = dense(1, 512, 0, 4, 4, 64, 64);
  says(p, "there are no keys");
}

void test_choice() {
  const auto engine_of = [](const AttnParams& p, int arch) {
    return strobe::cuda::plan(p, typical_device(arch)).launches[0].kernel.source;
  };
  AttnParams p = dense(2, 4096, 4096, 16, 16, 128, 128);
  expect(engine_of(p, 90) == &kFwdSm90, "a long dense call runs on sm90", "auto");
  expect(engine_of(p, 80) == &kFwdSm80 && engine_of(p, 100) == &kFwdSm80, "and elsewhere on sm80", "auto");
  p.engine = Engine::sm80;
  expect(engine_of(p, 90) == &kFwdSm80, "unless sm80 is asked for", "sm80");
  // Few rows are read at the memory's rate: what counts is how blocks fill the 132 processors.
  const auto runs_on = [&](const AttnParams& q, const KernelTemplate& kernel, const char* what) {
    expect(engine_of(q, 90) == &kernel, what, "auto");
  };
  runs_on(dense(16, 1, 8192, 32, 8, 128, 128), kFwdSm90, "one query, a block for each processor");
  runs_on(dense(64, 1, 8192, 32, 8, 128, 128), kFwdSm80, "one query, more blocks than processors");
  runs_on(dense(1, 1, 2048, 32, 8, 128, 128), kFwdSm80, "one query, short keys that are split");
  runs_on(dense(1, 1, 131072, 64, 8, 128, 128), kFwdSm90, "one query, long keys that are split");
  runs_on(dense(1, 1, 1, 1, 1, 64, 64), kFwdSm80, "one pair");
  runs_on(dense(64, 16, 8192, 32, 8, 128, 128), kFwdSm90, "64 rows share their keys");
  runs_on(dense(256, 64, 64, 16, 16, 64, 64), kFwdSm80, "many blocks with one tile of keys each");
  p.engine = Engine::any, p.dropout_p = 0.1f;
  expect(engine_of(p, 90) == &kFwdSm80, "dropout stays with sm80", "auto");
  p.dropout_p = 0.f, p.k.row_stride += 8, p.k.head_stride = 4;
  const char* const refusal = refusal_sm90(p, typical_device(90));
  expect(refusal != nullptr, "odd strides are refused", "strides");
}

// Appending keys and turning q come first, on every engine.
void test_append() {
  strobe::KVCacheParams c;
  c.fwd = dense(8, 512, 8192, 32, 8, 128, 128);
  c.fwd.causal = true, c.fwd.seqused_k = reinterpret_cast<const i32*>(memory), c.fwd.seqlen_new = 512;
  c.fwd.q.row_stride += 4;  // q is read from the workspace, where it lies densely
  c.k_new = c.v_new = c.fwd.k;
  c.rotary_cos = c.rotary_sin = memory;
  c.rotary_dim = 128, c.seqlen_ro = 8192;
  const DeviceInfo device = typical_device(90);
  const Plan plan = strobe::cuda::plan(c, device);
  expect(plan.count == 2 && plan.launches[0].kernel.source == &kAppendKV && plan.launches[1].kernel.source == &kFwdSm90,
         "appending, then attention on sm90", "append");
  alignas(256) static char workspace[256];
  LaunchParams blocks;
  fill_append(c, plan, workspace, blocks);
  const AttnParams p = attention_of(c, plan, workspace);
  fill_forward_sm90(p, plan, workspace, blocks);
  const auto* append = reinterpret_cast<const strobe::AppendLaunch*>(blocks.blocks[0]);
  const auto* forward = reinterpret_cast<const FwdSm90Launch*>(blocks.blocks[1]);
  const char* const q = static_cast<const char*>(append->q);
  expect(q >= workspace && q + 8 * 512 * 32 * 128 * 2 <= workspace + plan.workspace_bytes, "room for q", "append");
  expect(forward->p.q.data == q && blocks.boxes[0].data == q && forward->p.q.row_stride == 32 * 128,
         "attention reads the q that was turned", "append");
}

// Short queries against long keys: parts of the keys, and the launch that merges them.
void test_splits() {
  const DeviceInfo device = typical_device(90);
  for (i64 tokens : {1, 8}) {
    const AttnParams p = dense(1, tokens, 131072, 64, 8, 128, 128);
    const Plan plan = plan_forward_sm90(p, device);
    const std::string call = std::to_string(tokens) + " tokens";
    expect(plan.num_splits * 8 > device.sm_count * 8 / 10 && plan.num_splits * 8 <= device.sm_count, "one wave", call);
    expect(plan.count == 2 && plan.launches[1].kernel.source == &kCombine && plan.launches[1].overlaps &&
               !plan.launches[0].overlaps && plan.launches[1].kernel.values[2] == 1,
           "parts are merged by a kernel that is started early, a block for each row", call);
  }
  expect(plan_forward_sm90(dense(1, 1, 512, 32, 8, 128, 128), device).num_splits <= 2, "no short parts", "512 keys");
  const Plan older = plan_forward(dense(1, 1, 131072, 64, 8, 128, 128), typical_device(80));
  expect(older.count == 2 && !older.launches[1].overlaps, "sm_80 cannot start it early", "sm_80");
}

// Rows that are all there fill tall tiles, or lower ones are taken.
void test_filled() {
  for (const auto& [length, block_m] :
       {std::pair{256, 128}, {512, 128}, {640, 128}, {768, 192}, {1024, 128}, {1100, 192}}) {
    const Plan plan = plan_forward_sm90(dense(32, length, length, 16, 16, 128, 128), typical_device(90));
    expect(config_of(plan).block_m == block_m, "rows of a tile", std::to_string(length) + " queries");
  }
}

// A page of 64 keys is one box where dims allow it.
void test_page_boxes() {
  for (const auto& [dim, dim_v] :
       {std::pair{64, 64}, {96, 96}, {128, 128}, {192, 128}, {256, 256}, {32, 64}, {64, 128}, {96, 192}, {128, 256}}) {
    AttnParams p = dense(4, 4096, 4096, 32, 8, dim, dim_v);
    p.causal = true;
    put_in_pages(p, 64);
    const std::string call = "dims " + std::to_string(dim) + ", " + std::to_string(dim_v);
    expect(config_of(plan_forward_sm90(p, typical_device(90))).paged == 64, "a box of a whole page", call);
  }
}

// One sequence of few heads: low tiles fill the GPU, and keys are split where merging costs less than it saves.
void test_prompts() {
  const DeviceInfo device = typical_device(90);
  const auto plan_of = [&](i64 length, i64 heads, i64 dim = 128) {
    AttnParams p = dense(1, length, length, heads, heads, dim, dim);
    p.causal = true;
    return plan_forward_sm90(p, device);
  };
  const auto has = [&](i64 length, i64 heads, i32 block_m, bool splits) {
    const Plan plan = plan_of(length, heads);
    const std::string call = std::to_string(heads) + " heads, " + std::to_string(length) + " tokens";
    expect(config_of(plan).block_m == block_m, "rows of a tile", call + ", expected " + std::to_string(block_m));
    expect((plan.num_splits > 1) == splits, splits ? "keys are split" : "keys are not split", call);
    if (splits) {
      const i64 rows = plan.launches[1].grid[0] * i64(plan.launches[1].kernel.values[2]);
      expect(rows >= heads * length && rows < heads * (length + 3) + 16, "every row is merged", call);
      expect(config_of(plan).block_n == 64, "parts have small tiles", call);
    }
  };
  has(1024, 16, 128, false);
  has(1024, 8, 64, false);  // a block a processor
  has(4096, 8, 128, false);
  has(4096, 64, 192, false);
  has(4096, 2, 128, true);
  has(4096, 4, 128, true);
  has(8192, 4, 128, false);  // causal blocks fill the GPU without, the longest first
  has(3001, 1, 128, true);
  const Plan wide = plan_of(1024, 8, 256);
  expect(config_of(wide).block_m == 64 && wide.num_splits == 1 && wide.launches[0].grid[0] == 128,
         "blocks of one consumer, none of them split, cost less than parts", "8 heads, 1024 tokens, wide");
  expect(plan_of(1024, 1).num_splits <= strobe::kFewParts, "parts that a warp merges", "1 head, 1024 tokens");
}

// Long prompts on pages: tiles as plain calls have them, with boxes that divide a page.
void test_pages() {
  const DeviceInfo device = typical_device(90);
  const auto config = [&](i64 page, i64 dim, i64 dim_v, i64 window) {
    AttnParams p = dense(4, 4096, 4096, 16, window < 0 ? 16 : 2, dim, dim_v);
    put_in_pages(p, page);
    p.causal = window >= 0, p.window_left = window;
    return config_of(plan_forward_sm90(p, device));
  };
  for (i64 page : {8, 16, 64, 256})
    for (i64 dim : {64, 96, 128, 256}) {
      const FwdSm90Config c = config(page, dim, dim, -1);
      const std::string call = "pages of " + std::to_string(page) + ", dim " + std::to_string(dim);
      expect(page % c.paged == 0 && c.block_n % c.paged == 0 && c.paged >= 8, "boxes", call);
      expect(c.block_m == (dim == 64 ? 256 : dim == 256 ? 128 : 192), "rows of a tile", call);
    }
  expect(config(64, 192, 128, -1).paged == 64 && config(64, 128, 256, -1).paged == 64, "one box a tile", "pages of 64");
  expect(config(16, 192, 128, -1).paged == 16 && config(16, 128, 256, -1).paged == 16, "boxes of 16", "pages of 16");
  expect(config(64, 64, 64, 128).paged < config(64, 64, 64, 128).block_n, "a window's tiles move by boxes",
         "pages of 64");
}

// Where only lengths differ, heads follow each other; where rows do, sections come with their longest blocks first.
void test_order() {
  const DeviceInfo device = typical_device(90);
  AttnParams p = dense(16, 1024, 1024, 16, 16, 128, 128);
  expect(plan_forward_sm90(p, device).values[kDynamic] == 0, "equal blocks need no counter", "plain");
  p.seqused_k = reinterpret_cast<const i32*>(memory);
  const Plan lengths = plan_forward_sm90(p, device);
  expect(lengths.values[kDynamic] == 1 && lengths.values[kSection] == 1, "dealt out, head by head", "lengths");
  p.seqused_k = nullptr, p.causal = true;
  const i64 section = plan_forward_sm90(p, device).values[kSection];
  expect(section > 16 && section <= 128, "as many heads as share the cache", "causal, 1024");
  p = dense(1, 16384, 16384, 16, 16, 128, 128), p.causal = true;
  expect(plan_forward_sm90(p, device).values[kSection] >= 8, "at least 8 heads", "causal, 16384");
}

// Long queries of wide heads that see every key.
void test_pairs() {
  DeviceInfo device = typical_device(90);
  const auto pairs = [&](const AttnParams& p) {
    check(p, "pairs");
    const Plan plan = plan_forward_sm90(p, device);
    return config_of(plan).cluster == 2 && plan.values[kDynamic] == 0;
  };
  for (i64 dim : {128, 256}) {
    expect(pairs(dense(4, 4096, 4096, 8, 8, dim, 256)), "neighbouring blocks work together", "wide, 4096");
    expect(!pairs(dense(16, 1024, 1024, 8, 8, dim, 256)), "not so short ones", "wide, 1024");
    expect(!pairs(dense(1, 8192 + 1, 8192, 8, 8, dim, 256)), "an odd number of blocks", "wide, 8193");
  }
  for (const auto& [dim, dim_v] : {std::pair<i64, i64>{128, 256}, {256, 256}, {72, 200}, {200, 136}}) {
    // As tests/gpu calls them.
    AttnParams few = dense(1, 4500, 100, 2, 2, dim, dim_v);
    expect(pairs(few) && pairs(dense(2, 1125, 100, 4, 1, dim, dim_v)), "few keys", "4500");
    few.num_heads_k = 1;
    expect(pairs(few), "few keys, fewer heads of K", "4500");
  }
  expect(pairs(dense(2, 4500, 70, 4, 2, 128, 256)) && pairs(dense(2, 4500, 70, 4, 2, 256, 256)),
         "the sanitizers' calls", "4500");
  expect(!pairs(dense(1, 16384, 16384, 16, 16, 128, 128)), "narrow heads gain nothing", "128");
  AttnParams p = dense(1, 16384, 16384, 16, 16, 128, 256);
  p.causal = true;
  expect(!pairs(p), "rows see different keys", "causal");
  p.causal = false, p.window_left = 100;
  expect(!pairs(p), "rows see different keys", "window");
  p.window_left = -1, p.seqused_k = reinterpret_cast<const i32*>(memory);
  expect(!pairs(p), "lengths are not known", "seqused_k");
  p.seqused_k = nullptr;
  AttnParams paged = p;
  put_in_pages(paged, 64);
  expect(!pairs(paged), "a tile comes in boxes", "pages");
  pack_sequences(p, p.seqlen_k);
  expect(!pairs(p), "sequences have lengths of their own", "packed");
  p = dense(1, 16384, 16384, 16, 16, 128, 256);
  device.sm_count = 131;
  expect(plan_forward_sm90(p, device).launches[0].grid[0] == 130, "a processor more stays alone", "131");
  device.sm_count = 1;
  expect(config_of(plan_forward_sm90(p, device)).cluster == 1, "one processor has no neighbour", "1");
}

}  // namespace

int main() {
  test_append();
  test_pairs();
  test_splits();
  test_filled();
  test_page_boxes();
  test_prompts();
  test_pages();
  test_order();
  test_every_shape();
  test_packing();
  test_tiles();
  test_refusals();
  test_choice();
  std::printf("%ld passed, %ld failed\n", passed, failed);
  return failed != 0;
}
