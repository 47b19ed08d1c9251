// What the lanes of a warp hold: accumulators and operands of m16n8k16, and the one map from registers to rows and
// columns.
#pragma once

#include "cuda/ptx/copy.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/tile/smem.cuh"

namespace strobe {

__device__ __forceinline__ int lane_id() { return int(threadIdx.x % 32); }
__device__ __forceinline__ int warp_id() { return int(threadIdx.x / 32); }

// A warp's kM x kN f32 tile. A lane holds rows row(0) .. row(kRows - 1) and, of each, columns col(0) .. col(kCols - 1).
template <int kM_, int kN_>
struct Fragment {
  static constexpr int kM = kM_, kN = kN_, kRows = kM / 8, kCols = kN / 4;

  float x[kM / 16][kN / 8][4];

  __device__ __forceinline__ static int row(int r) { return r * 8 + lane_id() / 4; }
  __device__ __forceinline__ static int col(int c) { return c / 2 * 8 + lane_id() % 4 * 2 + c % 2; }
  __device__ __forceinline__ float& at(int r, int c) { return x[r / 2][c / 2][r % 2 * 2 + c % 2]; }
  __device__ __forceinline__ float at(int r, int c) const { return x[r / 2][c / 2][r % 2 * 2 + c % 2]; }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int m = 0; m < kM / 16; ++m)
#pragma unroll
      for (int n = 0; n < kN / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) x[m][n][e] = 0.f;
  }
};

// The left operand of a multiplication, kM x kK.
template <int kM_, int kK_>
struct Operand {
  static constexpr int kM = kM_, kK = kK_;
  u32 x[kM / 16][kK / 16][4];
};

// An accumulator's columns are an operand's depth: the same lane holds the same elements.
template <DType kType, int kM, int kN>
__device__ __forceinline__ Operand<kM, kN> to_operand(const Fragment<kM, kN>& f) {
  Operand<kM, kN> a;
#pragma unroll
  for (int m = 0; m < kM / 16; ++m)
#pragma unroll
    for (int n = 0; n < kN / 8; ++n) {
      a.x[m][n / 2][n % 2 * 2] = ptx::cvt_pair<kType>(f.x[m][n][0], f.x[m][n][1]);
      a.x[m][n / 2][n % 2 * 2 + 1] = ptx::cvt_pair<kType>(f.x[m][n][2], f.x[m][n][3]);
    }
  return a;
}

// The 16 x 16 left operand at (row, col) of a tile.
template <class Tile>
__device__ __forceinline__ void load_a(u32 (&a)[4], const Tile& tile, int row, int col) {
  const int lane = lane_id();
  ptx::ldmatrix_x4(a, tile.address(row + lane % 16, col + lane / 16 * 8));
}
// The same, of the tile's transpose: a(m, k) = tile(k, m).
template <class Tile>
__device__ __forceinline__ void load_a_trans(u32 (&a)[4], const Tile& tile, int row, int col) {
  const int lane = lane_id();
  ptx::ldmatrix_x4_trans(a, tile.address(row + lane % 8 + lane / 16 * 8, col + lane / 8 % 2 * 8));
}

// Right operands for two neighbouring n8 blocks at depth 16, in registers {b[0], b[1]} and {b[2], b[3]}.
// From a tile that holds the right matrix transposed, [n, k] (K of Q K^T): n = row .. row + 15, k = col .. col + 15.
template <class Tile>
__device__ __forceinline__ void load_b(u32 (&b)[4], const Tile& tile, int row, int col) {
  const int lane = lane_id();
  ptx::ldmatrix_x4(b, tile.address(row + lane % 8 + lane / 16 * 8, col + lane / 8 % 2 * 8));
}
// From a tile that holds it as [k, n] (V of P V): k = row .. row + 15, n = col .. col + 15.
template <class Tile>
__device__ __forceinline__ void load_b_trans(u32 (&b)[4], const Tile& tile, int row, int col) {
  const int lane = lane_id();
  ptx::ldmatrix_x4_trans(b, tile.address(row + lane % 16, col + lane / 16 * 8));
}

// The addresses of the four functions above at (0, 0), for loops that move them (SmemTile::moved).
template <class Tile>
__device__ __forceinline__ u32 lane_address_k(const Tile& tile, int lane = lane_id()) {  // load_a_trans, load_b
  return tile.address(lane % 8 + lane / 16 * 8, lane / 8 % 2 * 8);
}
template <class Tile>
__device__ __forceinline__ u32 lane_address_m(const Tile& tile, int lane = lane_id()) {  // load_a, load_b_trans
  return tile.address(lane % 16, lane / 16 * 8);
}

// Sum and maximum over the four lanes that share a row.
__device__ __forceinline__ float row_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}
__device__ __forceinline__ float row_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

}  // namespace strobe
