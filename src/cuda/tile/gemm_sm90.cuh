// The two multiplications of attention by wgmma, on tiles that tensor copies have put into panels of 64 columns, 128
// bytes a row with the 128-byte swizzle. They are only issued here: the caller commits and waits.
#pragma once

#include "cuda/ptx/wgmma.cuh"

namespace strobe {

// s = q k^T for 64 rows of q [panel][64][64] and the first kN keys of [panel][kKeys][64], of which these are the
// descriptors.
template <DType kType, int kDepth, int kKeys, int kN>
__device__ __forceinline__ void issue_scores(Fragment<16, kN>& s, u64 q, u64 k) {
#pragma unroll
  for (int i = 0; i < kDepth / 16; ++i) {
    const int panel = i / 4, in_panel = i % 4 * 32;
    ptx::Wgmma<kType, kN>::ss(s, q + ((panel * 64 * 128 + in_panel) >> 4), k + ((panel * kKeys * 128 + in_panel) >> 4),
                              i != 0);
  }
}

// The same for the 16 rows of a warp, by the warp alone and at once.
template <DType kType, int kDepth, int kN>
__device__ __forceinline__ void scores_again(Fragment<16, kN>& s, u32 q, u32 k) {
  using Rows = SmemTile<64, (kDepth + 63) / 64 * 64>;
  using Keys = SmemTile<kN, Rows::kCols>;
  u32 thread = threadIdx.x;
  ptx::opaque(thread);
  const int lane = int(thread % 32), row0 = int(thread / 32 % 4) * 16;
  const u32 row = Rows::moved(lane_address_m(Rows{q}, lane), row0, 0), key = lane_address_k(Keys{k}, lane);
  s.clear();
#pragma unroll 1
  for (int i = 0; i < kDepth; i += 16) {
    u32 a[4], b[4];
    ptx::ldmatrix_x4(a, Rows::moved(row, 0, i));
#pragma unroll
    for (int n = 0; n < kN; n += 16) {
      ptx::ldmatrix_x4(b, Keys::moved(key, n, i));
      ptx::mma_m16n8k16<kType>(s.x[0][n / 8], a, b[0], b[1]);
      ptx::mma_m16n8k16<kType>(s.x[0][n / 8 + 1], a, b[2], b[3]);
    }
  }
}

// out += p v for kKeys values [panel][kKeys][64], of which this is the descriptor.
template <DType kType, int kKeys, int kD>
__device__ __forceinline__ void issue_output(Fragment<16, kD>& out, const Operand<16, kKeys>& p, u64 v) {
#pragma unroll
  for (int i = 0; i < kKeys / 16; ++i) ptx::Wgmma<kType, kD>::rs(out, p.x[0][i], v + ((i * 16 * 128) >> 4));
}

}  // namespace strobe
