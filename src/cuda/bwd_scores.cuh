// The elementwise part of the backward pass, on transposed fragments: rows are keys, columns are queries.
#pragma once

#include "core/launch_bwd.h"
#include "core/philox.h"
#include "core/score.h"
#include "core/softmax.h"
#include "cuda/apply.cuh"
#include "cuda/ptx/memory.cuh"
#include "cuda/tile/fragment.cuh"

namespace strobe {

// What sees a key, as it lies in shared memory. Queries from seqlen_q on have a probability of 0: no end is needed.
__device__ __forceinline__ uint4 seen_of(const Queries& q) {
  return make_uint4(u32(q.begin), u32(q.end), q.full_begin < q.full_end ? u32(q.full_begin) : 0x7fffffffu, 0);
}

// C: BwdConfig or BwdKeptConfig.
template <auto C>
struct BwdScores {
  const AttnParams& p;
  const SeqInfo& seq;
  i32 head;
  i32 i0, j0;  // the fragment's first query and key
  u32 stats;   // shared memory, of query i0: -LSE in units of log2; C.block_m floats further, delta
  u32 seen;    // shared memory, of key j0: the queries that see it

  // Which scores dropout keeps, a bit each in the order of at(): drawn ahead of the products, while registers are free.
  template <int kM, int kN>
  struct Kept {
    u32 bits[kM * kN / 1024 + (kM * kN % 1024 != 0)] = {};
    __device__ __forceinline__ static constexpr int at(int n, int m, int r, int h, int e) {
      return (((n * (kM / 16) + m) * 2 + r) * 2 + h) * 2 + e;
    }
    __device__ __forceinline__ bool test(int i) const { return bits[i / 32] >> (i % 32) & 1; }
  };

  // From s = K Q^T and dp = V dO^T to dropped P^T and dS^T (without the scale). What lies behind the mask may be
  // infinite: it is replaced, not multiplied.
  template <bool kMasked, int kM, int kN>
  __device__ __forceinline__ void apply(Fragment<kM, kN>& s, Fragment<kM, kN>& dp, const Kept<kM, kN>& kept) const {
    const int lane = lane_id(), g = lane / 4, t = lane % 4;
    const float scale_log2 = p.scale * kLog2e;
    float slope = 0.f, keep_scale = 1.f;
    if constexpr (C.alibi) slope = p.alibi_slopes[seq.batch * p.alibi_batch_stride + head] * kLog2e;
    if constexpr (C.dropout) keep_scale = 1.f / (1.f - p.dropout_p);
    const i32 distance0 = i32(seq.seqlen_k - seq.seqlen_q) + i0 - j0 + 2 * t - g;
    // Which of 32 queries, from column `first` on, see this lane's key r; bit 0 is the lane's first one.
    const auto seen_by = [&](int r, int first) {
      const uint4 q = ptx::ld_shared_16(seen + u32((r * 8 + g) * 16));
      const i32 from = i0 + first + 2 * t;
      return (ptx::low_bits(i32(q.y) - from) & ~ptx::low_bits(i32(q.x) - from)) | ~ptx::low_bits(i32(q.z) - from);
    };
    // Ahead of the loop where that saves work and registers are left.
    constexpr bool kAhead = kMasked && kN > 16 && !C.softcap && !C.alibi;
    u32 ahead[kAhead ? kM / 8 : 1][(kN + 31) / 32];
    if constexpr (kAhead) {
#pragma unroll
      for (int r = 0; r < kM / 8; ++r)
#pragma unroll
        for (int first = 0; first < kN; first += 32) ahead[r][first / 32] = seen_by(r, first);
    }
#pragma unroll
    for (int n = 0; n < kN / 16; ++n) {
      float2 shift[2], delta[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const u32 at = stats + u32((n * 16 + h * 8 + 2 * t) * 4);
        shift[h] = ptx::ld_shared_8(at);
        delta[h] = ptx::ld_shared_8(at + C.block_m * 4);
      }
#pragma unroll
      for (int m = 0; m < kM / 16; ++m) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          u32 visible = 0;
          if constexpr (kAhead)
            visible = ahead[m * 2 + r][n / 2] >> (n % 2 * 16);
          else if constexpr (kMasked)
            visible = seen_by(m * 2 + r, n * 16);
#pragma unroll
          for (int h = 0; h < 2; ++h)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              float &sx = s.x[m][2 * n + h][2 * r + e], &dx = dp.x[m][2 * n + h][2 * r + e];
              const float shift_i = e ? shift[h].y : shift[h].x, delta_i = e ? delta[h].y : delta[h].x;
              float derivative = 1.f, score, d = dx;
              if constexpr (C.softcap) {
                const float capped = tanh_of(sx * (p.scale / p.softcap));
                derivative = 1.f - capped * capped;
                score = capped * (p.softcap * kLog2e);
              } else {
                score = sx * scale_log2;
              }
              if constexpr (C.alibi) {
                const i32 distance = distance0 + n * 16 + h * 8 + e - m * 16 - r * 8;
                score -= slope * fabsf(float(distance));
              }
              float prob = ptx::ex2(score + shift_i);
              if constexpr (kMasked) {
                const bool sees = visible >> (h * 8 + e) & 1;
                prob = sees ? prob : 0.f;
                d = sees ? d : 0.f;
                if constexpr (C.softcap) derivative = sees ? derivative : 0.f;
              }
              float keep = 1.f;
              if constexpr (C.dropout) keep = kept.test(kept.at(n, m, r, h, e)) ? keep_scale : 0.f;
              sx = prob * keep;
              dx = prob * (d * keep - delta_i) * derivative;
            }
        }
      }
    }
  }

  // A draw belongs to one query and two keys, g and its neighbour of the other parity, and so to two lanes: each makes
  // one of the two draws that they need.
  template <int kM, int kN>
  __device__ __forceinline__ Kept<kM, kN> draw() const {
    const int lane = lane_id(), g = lane / 4, t = lane % 4;
    const Dropout dropout = {p.seed, p.offset, keep_threshold(p.dropout_p)};
    constexpr int kDown = kM / 16, kDraws = kDown * (kN / 16), kBits = 8;  // of a draw
    Kept<kM, kN> kept;
#pragma unroll
    for (int word = 0; word * 32 < kDraws * kBits; ++word)
#pragma unroll 1  // draws at the same time would take registers
      for (int d = 0; d < min(32 / kBits, kDraws - word * (32 / kBits)); ++d) {
        const int n = (word * (32 / kBits) + d) / kDown, m = (word * (32 / kBits) + d) % kDown;
        const Philox4 own = dropout.lane((i0 + n * 16) / 16, (j0 + m * 16) / 16, seq.batch * p.num_heads + head,
                                         (2 * t + g % 2) * 4 + g / 2);
        u32 bits = 0;
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          const u32 other = __shfl_xor_sync(0xffffffffu, own.word[w], 4);
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const u32 pair = g % 2 == e ? own.word[w] : other;
            const u32 keep = (g % 2 ? pair >> 16 : pair & 0xFFFFu) < dropout.threshold;
            bits |= keep << kept.at(0, 0, w / 2, w % 2, e);
          }
        }
        kept.bits[word] |= bits << (d * kBits);
      }
    return kept;
  }
};

}  // namespace strobe
