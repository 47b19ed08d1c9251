// One query head of one sequence, as forward and backward see it: its mask, its score, its rows in the tensors.
#pragma once

#include <vector>

#include "core/philox.h"
#include "core/score.h"
#include "core/seqlen.h"
#include "core/softmax.h"
#include "cpu/portable/tile.h"

namespace strobe::cpu {

constexpr i64 kBlockM = 96, kBlockN = 64;

struct Head {
  const AttnParams& p;
  const SeqInfo& seq;
  Mask mask;
  Score score;
  Dropout dropout;
  i64 h, hk, hv, bh;
  std::vector<const void*> rows;  // of the tile being loaded

  Head(const AttnParams& params, const SeqInfo& sequence, i64 head)
      : p(params), seq(sequence), mask(mask_of(params, sequence)), h(head), rows(max(kBlockM, kBlockN)) {
    hk = h / (p.num_heads / p.num_heads_k);
    hv = h / (p.num_heads / p.num_heads_v);
    bh = seq.batch * p.num_heads + h;
    const float slope = p.alibi_slopes ? p.alibi_slopes[seq.batch * p.alibi_batch_stride + h] : 0.f;
    score = {p.scale, p.softcap, slope};
    dropout = {p.seed, p.offset, keep_threshold(p.dropout_p)};
  }

  void load_q(const Rows& from, i64 first, i64 count, i64 dim, float* out, i64 ld) {
    const i64 size = element_size(p.dtype);
    for (i64 i = 0; i < count; ++i) rows[i] = static_cast<char*>(from.data) + seq.q_index(from, first + i, h) * size;
    load_rows(p.dtype, rows.data(), count, dim, out, ld);
  }
  void load_k(const Rows& from, i64 first, i64 count, i64 kv_head, i64 dim, float* out, i64 ld) {
    const i64 size = element_size(p.dtype);
    for (i64 j = 0; j < count; ++j)
      rows[j] = static_cast<char*>(from.data) + seq.k_index(from, first + j, kv_head) * size;
    load_rows(p.dtype, rows.data(), count, dim, out, ld);
  }

  // Scores of row i against keys [first, first + count), in place, before masking.
  void score_row(float* row, i64 i, i64 first, i64 count) const {
    if (score.softcap == 0.f)
      scale_row(row, count, score.scale);
    else
      for (i64 c = 0; c < count; ++c) row[c] = score.capped(row[c]);
    if (score.alibi_slope != 0.f)
      for (i64 c = 0; c < count; ++c) row[c] += score.bias(i, first + c, mask.off());
  }
  void mask_row(float* row, i64 i, i64 first, i64 count, float value) const {
    const Keys keys = mask.keys(i);
    const i64 gap_begin = max<i64>(0, keys.kept_end - first), gap_end = min(count, keys.begin - first);
    for (i64 c = gap_begin; c < gap_end; ++c) row[c] = value;
    for (i64 c = max<i64>(0, keys.end - first); c < count; ++c) row[c] = value;
  }
  // Zeroes dropped probabilities and scales kept ones, two keys of a Philox word at a time.
  void drop_row(float* row, i64 i, i64 first, i64 count) const {
    const float kept = 1.f / (1.f - p.dropout_p);
    for (i64 c = 0; c < count; ++c) row[c] = dropout.keep(i, first + c, bh) ? row[c] * kept : 0.f;
  }
};

inline double flops_of(const AttnParams& p) {
  return 2. * double(p.total_q) * double(p.seqlen_k) * double(p.num_heads) * double(p.head_dim + p.head_dim_v);
}

}  // namespace strobe::cpu
