// Tiles of the backward pass: padded rows, so that a lane's addresses are one base plus constants where the pass reads
// each tile both straight and transposed; loads into them, and one gemm for the five products.
#pragma once

#include "core/config_bwd.h"
#include "cuda/ptx/copy.cuh"
#include "cuda/tile/fragment.cuh"

namespace strobe {

template <int kRows_, int kCols_>
struct PaddedTile {
  static constexpr int kRows = kRows_, kCols = kCols_;  // kCols: a multiple of 16
  static constexpr int kStride = (kCols + 8) * 2;       // bytes
  static constexpr int kBytes = kRows * kStride;
  static_assert(kBytes == bwd_padded_bytes(kRows, kCols));
};

// How kThreads threads share the 16-byte chunks of a tile: kAcross neighbours read one row, kDown rows at a time.
template <class Tile, int kThreads>
struct RowLoader {
  static constexpr int kChunks = Tile::kCols / 8;
  static constexpr int kAcross = kChunks % 8 == 0 ? 8 : kChunks % 4 == 0 ? 4 : 2, kDown = kThreads / kAcross;

  __device__ __forceinline__ static int row() { return int(threadIdx.x) / kAcross; }
  __device__ __forceinline__ static int chunk() { return int(threadIdx.x) % kAcross; }

  static constexpr int kPerRow = kChunks / kAcross, kPieces = (Tile::kRows + kDown - 1) / kDown * kPerRow;

  // Loads piece 0 .. kPieces - 1. `from` is the thread's first chunk, of its row() of the tile; `rows` of the tile
  // exist, the others and columns from kDim on become zeros: nothing is read there, whatever the address.
  template <int kDim>
  __device__ __forceinline__ static void load_piece(int piece, u32 tile, const u16* from, i64 row_stride, int rows) {
    const int r = piece / kPerRow * kDown, c = piece % kPerRow * kAcross;
    if (Tile::kRows % kDown != 0 && row() + r >= Tile::kRows) return;
    const bool read = row() + r < rows && (kDim == Tile::kCols || (c + chunk()) * 8 < kDim);
    ptx::cp_async_16(tile + u32(row() * Tile::kStride + chunk() * 16) + u32(r * Tile::kStride + c * 16),
                     from + r * row_stride + c * 8, read ? 16u : 0u);
  }
  template <int kDim>
  __device__ __forceinline__ static void load(u32 tile, const u16* from, i64 row_stride, int rows) {
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) load_piece<kDim>(piece, tile, from, row_stride, rows);
  }
};

// A lane's address of an operand that starts at (row, col) of the tile; see load_a, load_b and their _trans.
template <class Tile>
__device__ __forceinline__ u32 lane_address(u32 tile, int row, int col) {  // load_a, load_b_trans
  const int lane = lane_id();
  return tile + u32((row + lane % 16) * Tile::kStride + (col + lane / 16 * 8) * 2);
}
template <class Tile>
__device__ __forceinline__ u32 lane_address_swapped(u32 tile, int row, int col) {  // load_b, load_a_trans
  const int lane = lane_id();
  return tile + u32((row + lane % 8 + lane / 16 * 8) * Tile::kStride + (col + lane / 8 % 2 * 8) * 2);
}

template <bool kTrans>
__device__ __forceinline__ void load_matrices(u32 (&r)[4], u32 address) {
  if constexpr (kTrans)
    ptx::ldmatrix_x4_trans(r, address);
  else
    ptx::ldmatrix_x4(r, address);
}

// acc += A B over depth kK. load_a(k, a) gives the left operands of a k step. kBTrans: B lies as [k, n], else as [n,
// k]. Blocks of 16 columns from `blocks` on do not exist where kRagged. between(step) runs after each of the kK / 16 *
// kN / 16 steps: work for units that the products leave idle.
struct Nothing {
  __device__ __forceinline__ void operator()(int) const {}
};
template <DType kType, class TileB, bool kBTrans, int kK, bool kRagged, int kM, int kN, class LoadA,
          class Between = Nothing>
__device__ __forceinline__ void gemm_steps(Fragment<kM, kN>& acc, LoadA load_a, u32 b, int blocks,
                                           Between between = {}) {
#pragma unroll
  for (int k = 0; k < kK / 16; ++k) {
    u32 ra[kM / 16][4];
    load_a(k, ra);
#pragma unroll
    for (int n = 0; n < kN / 16; ++n) {
      if (kRagged && n >= blocks) {
        between(k * (kN / 16) + n);
        continue;
      }
      u32 rb[4];
      load_matrices<kBTrans>(rb,
                             b + u32(kBTrans ? k * 16 * TileB::kStride + n * 32 : n * 16 * TileB::kStride + k * 32));
#pragma unroll
      for (int m = 0; m < kM / 16; ++m) {
        ptx::mma_m16n8k16<kType>(acc.x[m][2 * n], ra[m], rb[0], rb[1]);
        ptx::mma_m16n8k16<kType>(acc.x[m][2 * n + 1], ra[m], rb[2], rb[3]);
      }
      between(k * (kN / 16) + n);
    }
  }
}

// The same with both in shared memory. kATrans: A lies as [k, m].
template <DType kType, class TileA, bool kATrans, class TileB, bool kBTrans, int kK, bool kRagged, int kM, int kN,
          class Between = Nothing>
__device__ __forceinline__ void gemm(Fragment<kM, kN>& acc, u32 a, u32 b, int blocks, Between between = {}) {
  const auto load_a = [&](int k, u32(&ra)[kM / 16][4]) {
#pragma unroll
    for (int m = 0; m < kM / 16; ++m)
      load_matrices<kATrans>(ra[m],
                             a + u32(kATrans ? k * 16 * TileA::kStride + m * 32 : m * 16 * TileA::kStride + k * 32));
  };
  gemm_steps<kType, TileB, kBTrans, kK, kRagged>(acc, load_a, b, blocks, between);
}

// The same with A in registers.
template <DType kType, class TileB, bool kBTrans, bool kRagged, int kM, int kN, int kK>
__device__ __forceinline__ void gemm(Fragment<kM, kN>& acc, const Operand<kM, kK>& a, u32 b, int blocks) {
  const auto load_a = [&](int k, u32(&ra)[kM / 16][4]) {
#pragma unroll
    for (int m = 0; m < kM / 16; ++m)
#pragma unroll
      for (int e = 0; e < 4; ++e) ra[m][e] = a.x[m][k][e];
  };
  gemm_steps<kType, TileB, kBTrans, kK, kRagged>(acc, load_a, b, blocks);
}

// An accumulator's place in dq_acc: neighbouring lanes lie side by side, in pieces of 16 bytes where one instruction
// can add those.
#if __CUDA_ARCH__ >= 900
constexpr bool kAddsVectors = true;
#else
constexpr bool kAddsVectors = false;
#endif
__device__ __forceinline__ constexpr int dq_slot(int piece, int e) {  // from dq_lane()
  return kAddsVectors ? piece * 128 + e : (piece * 4 + e) * 32;
}
__device__ __forceinline__ int dq_lane() { return kAddsVectors ? lane_id() * 4 : lane_id(); }

}  // namespace strobe
