// The cache half of decoding: new keys and values go into the cache in place, turned by rotary position (RoFormer,
// arXiv 2104.09864), and q is turned into a temporary.
#include <cstring>
#include <vector>

#include "core/seqlen.h"
#include "cpu/cpu.h"
#include "cpu/element.h"
#include "cpu/parallel.h"

namespace strobe::cpu {
namespace {

struct Rotary {
  const KVCacheParams& c;
  std::vector<float> in, out, cos, sin;

  explicit Rotary(const KVCacheParams& params)
      : c(params),
        in(params.fwd.head_dim),
        out(params.fwd.head_dim),
        cos(params.rotary_dim / 2),
        sin(params.rotary_dim / 2) {}

  void turn(const void* from, i64 position, void* to) {
    const DType t = c.fwd.dtype;
    const i64 half = c.rotary_dim / 2, offset = min(position, c.seqlen_ro - 1) * half * element_size(t);
    load_row(t, from, c.fwd.head_dim, in.data());
    load_row(t, static_cast<const char*>(c.rotary_cos) + offset, half, cos.data());
    load_row(t, static_cast<const char*>(c.rotary_sin) + offset, half, sin.data());
    out = in;
    for (i64 x = 0; x < half; ++x) {
      const i64 a = c.rotary_interleaved ? 2 * x : x, b = c.rotary_interleaved ? 2 * x + 1 : x + half;
      out[a] = in[a] * cos[x] - in[b] * sin[x];
      out[b] = in[b] * cos[x] + in[a] * sin[x];
    }
    store_row(t, out.data(), c.fwd.head_dim, to);
  }
};

i64 length_before(const AttnParams& p, i64 b) { return p.seqused_k ? p.seqused_k[b] : p.seqlen_k; }

void append(const KVCacheParams& c, i64 b) {
  AttnParams p = c.fwd;
  p.leftpad_k = nullptr;  // positions count from the start of the cache, padding included
  const SeqInfo seq = SeqInfo::of(p, b);
  const i64 size = element_size(p.dtype), base = length_before(p, b);
  Rotary rotary(c);
  for (i64 i = 0; i < p.seqlen_new; ++i) {
    for (i64 h = 0; h < p.num_heads_k; ++h) {
      const char* from = static_cast<const char*>(c.k_new.data) +
                         (b * c.k_new.batch_stride + i * c.k_new.row_stride + h * c.k_new.head_stride) * size;
      char* to = static_cast<char*>(p.k.data) + seq.k_index(p.k, base + i, h) * size;
      if (c.rotary_dim > 0)
        rotary.turn(from, base + i, to);
      else
        std::memcpy(to, from, p.head_dim * size);
    }
    for (i64 h = 0; h < p.num_heads_v; ++h) {
      const char* from = static_cast<const char*>(c.v_new.data) +
                         (b * c.v_new.batch_stride + i * c.v_new.row_stride + h * c.v_new.head_stride) * size;
      std::memcpy(static_cast<char*>(p.v.data) + seq.k_index(p.v, base + i, h) * size, from, p.head_dim_v * size);
    }
  }
}

// Rows of q are turned by their own position under a causal mask or a window, else all by the cache's length.
void turn_queries(const KVCacheParams& c, i64 b, char* out) {
  const AttnParams& p = c.fwd;
  const SeqInfo seq = SeqInfo::of(p, b);
  const i64 size = element_size(p.dtype);
  const bool per_row = p.causal || p.window_left >= 0 || p.window_right >= 0;
  Rotary rotary(c);
  for (i64 i = 0; i < seq.rows_q; ++i)
    for (i64 h = 0; h < p.num_heads; ++h)
      rotary.turn(static_cast<const char*>(p.q.data) + seq.q_index(p.q, i, h) * size,
                  length_before(p, b) + (per_row ? i : 0),
                  out + ((b * p.seqlen_q + i) * p.num_heads + h) * p.head_dim * size);
}

}  // namespace

void kvcache(const KVCacheParams& c, const strobe_executor& executor) {
  const AttnParams& p = c.fwd;
  if (p.seqlen_new > 0) {
    const double elements =
        double(p.batch * p.seqlen_new * (p.num_heads_k * p.head_dim + p.num_heads_v * p.head_dim_v));
    parallel_items(executor, p.batch, elements, [&](i64 b) { append(c, b); });
  }
  if (c.rotary_dim == 0) return forward(p, executor);
  AttnParams turned = p;
  std::vector<char> q(p.batch * p.seqlen_q * p.num_heads * p.head_dim * element_size(p.dtype));
  parallel_items(executor, p.batch, double(q.size()), [&](i64 b) { turn_queries(c, b, q.data()); });
  turned.q = {q.data(), p.seqlen_q * p.num_heads * p.head_dim, p.num_heads * p.head_dim, p.head_dim};
  forward(turned, executor);
}

}  // namespace strobe::cpu
