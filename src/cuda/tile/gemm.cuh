// accumulator += A * B with operands that arrive from shared memory or registers one step ahead of their use.
#pragma once

#include "cuda/tile/fragment.cuh"

namespace strobe {

// load_left(k, u32 (&)[kM / 16][4]): the kM x 16 left operand at depth 16 k.
// load_right(k, n, u32 (&)[4]): the 16 x 16 right operand at depth 16 k, column 16 n.
template <DType kType, int kDepth, int kM, int kN, class Left, class Right>
__device__ __forceinline__ void gemm(Fragment<kM, kN>& acc, Left load_left, Right load_right) {
  constexpr int kAcross = kN / 16;
  u32 a[2][kM / 16][4], b[2][4];
  load_left(0, a[0]);
  load_right(0, 0, b[0]);
#pragma unroll
  for (int k = 0; k < kDepth / 16; ++k)
#pragma unroll
    for (int n = 0; n < kAcross; ++n) {
      const int now = (k * kAcross + n) % 2;
      if (n + 1 < kAcross) {
        load_right(k, n + 1, b[1 - now]);
      } else if (k + 1 < kDepth / 16) {
        load_left(k + 1, a[(k + 1) % 2]);
        load_right(k + 1, 0, b[1 - now]);
      }
#pragma unroll
      for (int m = 0; m < kM / 16; ++m) {
        ptx::mma_m16n8k16<kType>(acc.x[m][n * 2], a[k % 2][m], b[now][0], b[now][1]);
        ptx::mma_m16n8k16<kType>(acc.x[m][n * 2 + 1], a[k % 2][m], b[now][2], b[now][3]);
      }
    }
}

}  // namespace strobe
