#include "cpu/probs.h"

#include "core/philox.h"
#include "core/score.h"
#include "core/seqlen.h"
#include "core/softmax.h"

#define STROBE_ISA plain
#include "cpu/simd.h"

namespace strobe::cpu {
namespace {

template <class T>
void write_probabilities(const AttnParams& p, T* s_dmask, i64 rows_padded, i64 cols_padded) {
  const Dropout dropout = {p.seed, p.offset, keep_threshold(p.dropout_p)};
  for (i64 bh = 0; bh < p.batch * p.num_heads; ++bh) {
    const i64 b = bh / p.num_heads, h = bh % p.num_heads, hk = h / (p.num_heads / p.num_heads_k);
    const SeqInfo seq = SeqInfo::of(p, b);
    const Mask mask = mask_of(p, seq);
    const Score score = {p.scale, p.softcap, p.alibi_slopes ? p.alibi_slopes[b * p.alibi_batch_stride + h] : 0.f};
    for (i64 i = 0; i < rows_padded; ++i) {
      T* row = s_dmask + (bh * rows_padded + i) * cols_padded;
      for (i64 j = 0; j < cols_padded; ++j) plain::narrow(row[j], 0.f);
      if (i >= seq.seqlen_q) continue;
      const float lse = p.lse[seq.lse_index(p, i, h)];
      const T* q = static_cast<const T*>(p.q.data) + seq.q_index(p.q, i, h);
      for (i64 j = 0; j < min(cols_padded, seq.seqlen_k); ++j) {
        if (!mask.visible(i, j)) continue;
        const T* k = static_cast<const T*>(p.k.data) + seq.k_index(p.k, j, hk);
        float qk = 0.f;
        for (i64 c = 0; c < p.head_dim; ++c) qk += plain::widen(q[c]) * plain::widen(k[c]);
        const float value = probability(score.apply(qk, i, j, mask.off()), lse);
        plain::narrow(row[j], p.dropout_p > 0.f && !dropout.keep(i, j, bh) ? -value : value);
      }
    }
  }
}

}  // namespace

void probabilities(const AttnParams& params, void* s_dmask, i64 rows_padded, i64 cols_padded) {
  switch (params.dtype) {
    case DType::f32:
      return write_probabilities(params, static_cast<float*>(s_dmask), rows_padded, cols_padded);
    case DType::f16:
      return write_probabilities(params, static_cast<plain::f16*>(s_dmask), rows_padded, cols_padded);
    case DType::bf16:
      return write_probabilities(params, static_cast<plain::bf16*>(s_dmask), rows_padded, cols_padded);
  }
}

}  // namespace strobe::cpu
