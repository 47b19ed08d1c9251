#include "cpu/probabilities.h"

#include <vector>

#include "core/philox.h"
#include "core/score.h"
#include "core/seqlen.h"
#include "core/softmax.h"
#include "cpu/element.h"

namespace strobe::cpu {

void probabilities(const AttnParams& p, void* s_dmask, i64 rows, i64 cols) {
  const i64 size = element_size(p.dtype);
  const Dropout dropout = {p.seed, p.offset, keep_threshold(p.dropout_p)};
  std::vector<float> q(p.head_dim), k(p.head_dim), row(cols);
  char* out = static_cast<char*>(s_dmask);
  for (i64 b = 0; b < p.batch; ++b) {
    const SeqInfo seq = SeqInfo::of(p, b);
    const Mask mask = mask_of(p, seq);
    for (i64 h = 0; h < p.num_heads; ++h) {
      const i64 hk = h / (p.num_heads / p.num_heads_k);
      const float slope = p.alibi_slopes ? p.alibi_slopes[b * p.alibi_batch_stride + h] : 0.f;
      const Score score = {p.scale, p.softcap, slope};
      for (i64 i = 0; i < rows; ++i, out += cols * size) {
        std::fill(row.begin(), row.end(), 0.f);
        if (i < seq.seqlen_q) {
          load_row(p.dtype, static_cast<char*>(p.q.data) + seq.q_index(p.q, i, h) * size, p.head_dim, q.data());
          const float lse = p.lse[seq.lse_index(p, i, h)];
          for (i64 j = 0; j < min(cols, seq.seqlen_k); ++j) {
            if (!mask.visible(i, j)) continue;
            load_row(p.dtype, static_cast<char*>(p.k.data) + seq.k_index(p.k, j, hk) * size, p.head_dim, k.data());
            float qk = 0.f;
            for (i64 d = 0; d < p.head_dim; ++d) qk += q[d] * k[d];
            const float prob = probability(score.apply(qk, i, j, mask.off()), lse);
            row[j] = dropout.keep(i, j, b * p.num_heads + h) ? prob : -prob;
          }
        }
        store_row(p.dtype, row.data(), cols, out);
      }
    }
  }
}

}  // namespace strobe::cpu
