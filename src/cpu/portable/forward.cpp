// Forward: FlashAttention-2's loop (Dao, arXiv 2307.08691) over the key tiles that the mask gives. Where there are few
// query blocks the walk over the keys is cut into splits, whose partial results are merged in a fixed order.
#include <cstring>

#include "cpu/cpu.h"
#include "cpu/portable/head.h"
#include "cpu/portable/parallel.h"

namespace strobe::cpu {
namespace {

constexpr i64 kSplitTiles =
    16;  // key tiles of a split: enough work to share, few enough that one query fills many cores

struct Block {
  SeqInfo seq;
  i64 h, first, rows;
  i64 splits;
};

// Row states and unnormalised output [rows, ld] of one block over one part of its walk.
struct Partial {
  std::vector<RowState> state;
  std::vector<float> out;
};

void attend(Head& head, const Block& block, const Walk& walk, Partial& result) {
  const AttnParams& p = head.p;
  const i64 d = p.head_dim, dv = padded(p.head_dim_v);
  result.state.assign(block.rows, {});
  result.out.assign(block.rows * dv, 0.f);
  thread_local std::vector<float> buffer;
  buffer.resize(block.rows * (d + kBlockN) + kBlockN * (d + d + dv));
  float* q = buffer.data();
  float* scores = q + block.rows * d;
  float* k = scores + block.rows * kBlockN;
  float* k_transposed = k + kBlockN * d;
  float* v = k_transposed + kBlockN * d;
  head.load_q(p.q, block.first, block.rows, d, q, d);
  for (const Run& run : walk.run)
    for (i64 tile = run.begin; tile < run.end; ++tile) {
      const i64 first = tile * kBlockN, cols = min(kBlockN, head.seq.seqlen_k - first);
      const bool masked = tile < run.full_begin || tile >= run.full_end;
      head.load_k(p.k, first, cols, head.hk, d, k, d);
      head.load_k(p.v, first, cols, head.hv, p.head_dim_v, v, dv);
      transpose(k, d, cols, d, k_transposed, kBlockN);
      gemm(block.rows, kBlockN, d, q, d, 1, k_transposed, kBlockN, scores, kBlockN, false);
      for (i64 r = 0; r < block.rows; ++r) {
        const i64 i = block.first + r;
        float* row = scores + r * kBlockN;
        head.score_row(row, i, first, cols);
        if (masked) head.mask_row(row, i, first, cols, kNegInfinity);
        RowState& state = result.state[r];
        const RowState old = state;
        state.max = max(old.max, max_of(row, cols));
        const float factor = rescale(old.max, state.max);
        state.sum = old.sum * factor + exp_row(row, cols, shift_of(state.max));
        if (p.dropout_p > 0.f) head.drop_row(row, i, first, cols);
        if (factor != 1.f) scale_row(&result.out[r * dv], dv, factor);
      }
      gemm(block.rows, dv, cols, scores, kBlockN, 1, v, dv, result.out.data(), dv, true);
    }
}

void merge_into(Partial& a, const Partial& b, i64 dv) {
  for (i64 r = 0; r < i64(a.state.size()); ++r) {
    const MergeFactors factors = merge(a.state[r], b.state[r]);
    for (i64 c = 0; c < dv; ++c) a.out[r * dv + c] = a.out[r * dv + c] * factors.a + b.out[r * dv + c] * factors.b;
  }
}

void finish(const AttnParams& p, const Block& block, const Partial& partial) {
  const i64 dv = padded(p.head_dim_v);
  for (i64 r = 0; r < block.rows; ++r) {
    const RowResult result = finalize(partial.state[r], p.s_aux ? p.s_aux + block.h : nullptr);
    char* out = static_cast<char*>(p.out.data);
    const i64 at = block.seq.q_index(p.out, block.first + r, block.h);
    store_row(p.dtype, &partial.out[r * dv], result.scale, p.head_dim_v, out + at * element_size(p.dtype));
    if (p.lse) p.lse[block.seq.lse_index(p, block.first + r, block.h)] = result.lse;
  }
}

// Rows that the tensors hold but no sequence uses see nothing.
void clear_unused(const AttnParams& p, const SeqInfo& seq) {
  const Partial nothing = {{{}}, std::vector<float>(padded(p.head_dim_v), 0.f)};
  AttnParams plain = p;
  plain.s_aux = nullptr;
  for (i64 i = seq.seqlen_q; i < seq.rows_q; ++i)
    for (i64 h = 0; h < p.num_heads; ++h) finish(plain, {seq, h, i, 1, 1}, nothing);
}

}  // namespace

void forward(const AttnParams& p, const strobe_executor& executor) {
  // Blocks of all sequences, latest rows first: under a causal mask they are the longest.
  std::vector<Block> blocks;
  i64 splits = 0;
  for (i64 b = 0; b < p.batch; ++b) {
    const SeqInfo seq = SeqInfo::of(p, b);
    if (seq.seqlen_q < seq.rows_q) clear_unused(p, seq);
    const Mask mask = mask_of(p, seq);
    for (i64 m = ceil_div(seq.seqlen_q, kBlockM) - 1; m >= 0; --m) {
      const i64 first = m * kBlockM, rows = min(kBlockM, seq.seqlen_q - first);
      const i64 tiles = mask.visit(first, first + rows, kBlockN).tiles();
      // A function of the problem alone, so that the bits do not depend on the machine.
      const bool few_blocks = p.batch * p.num_heads * ceil_div(p.seqlen_q, kBlockM) < 64;
      const i64 n = few_blocks && rows <= 16 ? max<i64>(1, tiles / kSplitTiles) : 1;
      for (i64 h = 0; h < p.num_heads; ++h) blocks.push_back({seq, h, first, rows, n});
      if (n > 1) splits += n * p.num_heads;
    }
  }
  if (splits == 0) {
    parallel_items(executor, i64(blocks.size()), flops_of(p), [&](i64 item) {
      const Block& block = blocks[item];
      Head head(p, block.seq, block.h);
      thread_local Partial result;
      attend(head, block, head.mask.visit(block.first, block.first + block.rows, kBlockN), result);
      finish(p, block, result);
    });
    return;
  }
  struct Part {
    i64 block, split;
  };
  std::vector<Part> parts;
  for (i64 i = 0; i < i64(blocks.size()); ++i)
    for (i64 s = 0; s < blocks[i].splits; ++s) parts.push_back({i, s});
  std::vector<Partial> partials(parts.size());
  parallel_items(executor, i64(parts.size()), flops_of(p), [&](i64 item) {
    const Block& block = blocks[parts[item].block];
    Head head(p, block.seq, block.h);
    const Walk walk = head.mask.visit(block.first, block.first + block.rows, kBlockN);
    const i64 tiles = walk.tiles(), s = parts[item].split;
    attend(head, block, split(walk, tiles * s / block.splits, tiles * (s + 1) / block.splits), partials[item]);
  });
  i64 next = 0;
  for (const Block& block : blocks) {
    Partial& first = partials[next];
    for (i64 s = 1; s < block.splits; ++s) merge_into(first, partials[next + s], padded(p.head_dim_v));
    finish(p, block, first);
    next += block.splits;
  }
}

}  // namespace strobe::cpu
