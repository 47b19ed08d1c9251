#include "cpu/probabilities.h"

#include "cpu/portable/head.h"

namespace strobe::cpu {

void probabilities(const AttnParams& p, void* s_dmask, i64 rows, i64 cols) {
  std::vector<float> q(p.head_dim), k(p.head_dim), row(cols);
  char* out = static_cast<char*>(s_dmask);
  for (i64 b = 0; b < p.batch; ++b) {
    const SeqInfo seq = SeqInfo::of(p, b);
    for (i64 h = 0; h < p.num_heads; ++h) {
      Head head(p, seq, h);
      for (i64 i = 0; i < rows; ++i, out += cols * element_size(p.dtype)) {
        std::fill(row.begin(), row.end(), 0.f);
        if (i < seq.seqlen_q) {
          head.load_q(p.q, i, 1, p.head_dim, q.data(), p.head_dim);
          const float lse = p.lse[seq.lse_index(p, i, h)];
          for (i64 j = 0; j < min(cols, seq.seqlen_k); ++j) {
            if (!head.mask.visible(i, j)) continue;
            head.load_k(p.k, j, 1, head.hk, p.head_dim, k.data(), p.head_dim);
            float qk = 0.f;
            for (i64 d = 0; d < p.head_dim; ++d) qk += q[d] * k[d];
            const float prob = probability(head.score.apply(qk, i, j, head.mask.off()), lse);
            row[j] = head.dropout.keep(i, j, head.bh) ? prob : -prob;
          }
        }
        store_row(p.dtype, row.data(), 1.f, cols, out);
      }
    }
  }
}

}  // namespace strobe::cpu
