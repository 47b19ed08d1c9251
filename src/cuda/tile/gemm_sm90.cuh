// The two multiplications of attention by wgmma, on tiles that tensor copies have put into panels of 64 columns, 128
// bytes a row with the 128-byte swizzle. They are only issued here: the caller commits and waits.
#pragma once

#include "cuda/ptx/wgmma.cuh"

namespace strobe {

// s = q k^T for 64 rows of q [panel][64][64] and the first kN keys of [panel][kKeys][64].
template <DType kType, int kDepth, int kKeys, int kN>
__device__ __forceinline__ void issue_scores(Fragment<16, kN>& s, u32 q, u32 k) {
  // The descriptors of a wide head would be kept in registers from item to item, which have no room: q is taken as new.
  if (kDepth > 128) asm volatile("" : "+r"(q));
  const u64 a = ptx::matrix_descriptor(q), b = ptx::matrix_descriptor(k);
#pragma unroll
  for (int i = 0; i < kDepth / 16; ++i) {
    const int panel = i / 4, in_panel = i % 4 * 32;
    ptx::Wgmma<kType, kN>::ss(s, a + ((panel * 64 * 128 + in_panel) >> 4), b + ((panel * kKeys * 128 + in_panel) >> 4),
                              i != 0);
  }
}

// out += p v for kKeys values [panel][kKeys][64].
template <DType kType, int kKeys, int kD>
__device__ __forceinline__ void issue_output(Fragment<16, kD>& out, const Operand<16, kKeys>& p, u32 v) {
  const u64 b = ptx::matrix_descriptor(v, kKeys * 128);
#pragma unroll
  for (int i = 0; i < kKeys / 16; ++i) ptx::Wgmma<kType, kD>::rs(out, p.x[0][i], b + ((i * 16 * 128) >> 4));
}

}  // namespace strobe
