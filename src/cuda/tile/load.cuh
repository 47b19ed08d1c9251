// Global to shared memory by cp.async. A loader is told where a row lies; rows that do not exist become zeros, so that
// nothing behind a tensor's end, NaN included, is ever multiplied.
#pragma once

#include "core/config.h"
#include "cuda/ptx/copy.cuh"
#include "cuda/tile/smem.cuh"

namespace strobe {

// A compile-time choice handed to a lambda.
template <bool kValue>
struct Bool {
  static constexpr bool value = kValue;
};

// How kThreads threads share the 16-byte chunks of a tile: kAcross neighbours read one row, kDown rows at a time.
template <class Tile, int kThreads>
struct LoadShape {
  static constexpr int kChunks = Tile::kCols / 8;
  static constexpr int kAcross = kChunks % 8 == 0 ? 8 : kChunks % 4 == 0 ? 4 : 2;
  static constexpr int kDown = kThreads / kAcross;
  static constexpr int kPasses = (Tile::kRows + kDown - 1) / kDown;
};

// Loads the tile's rows from row_pointer(r), which gives u16 elements, or null for a row of zeros where kBounded.
// kDim: columns that exist in memory; those up to Tile::kCols become zeros.
template <int kThreads, int kDim, bool kBounded, class Tile, class RowPointer>
__device__ __forceinline__ void load_tile(const Tile& tile, RowPointer row_pointer) {
  using Shape = LoadShape<Tile, kThreads>;
  const int first_row = int(threadIdx.x) / Shape::kAcross, chunk = int(threadIdx.x) % Shape::kAcross;
#pragma unroll
  for (int pass = 0; pass < Shape::kPasses; ++pass) {
    const int row = first_row + pass * Shape::kDown;
    if (Tile::kRows % Shape::kDown != 0 && row >= Tile::kRows) break;
    const u16* from = row_pointer(row);
#pragma unroll
    for (int c = 0; c < Shape::kChunks; c += Shape::kAcross) {
      const int col = (c + chunk) * 8;
      const u32 to = tile.address(row, col);
      // With a bound, a chunk that is not read still needs an address; any mapped one does, and null is not read.
      if (kBounded || Tile::kCols != kDim) {
        const bool exists = (!kBounded || from != nullptr) && (Tile::kCols == kDim || col < kDim);
        ptx::cp_async_16(to, exists ? from + col : from, exists ? 16u : 0u);
      } else {
        ptx::cp_async_16(to, from + col);
      }
    }
  }
}

// This thread's first chunk of the tile whose first row is row `first` of a tensor with rows row_stride elements apart.
template <class Tile, int kThreads>
__device__ __forceinline__ const u16* row_source(const u16* data, i32 first, i64 row_stride) {
  constexpr int kAcross = LoadShape<Tile, kThreads>::kAcross;
  u32 thread = threadIdx.x;
  ptx::opaque(thread);
  return data + (first + i32(thread / kAcross)) * row_stride + thread % kAcross * 8;
}

// load_tile() for such a tensor, of whose rows `exist` are left. Keeps nothing in registers between calls.
template <int kThreads, int kDim, bool kBounded, class Tile>
__device__ __forceinline__ void load_rows(const Tile& tile, const u16* from, i64 row_stride, i32 exist) {
  using Shape = LoadShape<Tile, kThreads>;
  static_assert(Shape::kDown % 8 == 0 && Shape::kAcross * 8 == Tile::kPanel);
  u32 thread = threadIdx.x;
  ptx::opaque(thread);
  ptx::opaque(row_stride);
  const int row = int(thread / Shape::kAcross), col = int(thread % Shape::kAcross * 8);
  const u32 to = tile.address(row, col);
#pragma unroll
  for (int pass = 0; pass < Shape::kPasses; ++pass) {
    const int down = pass * Shape::kDown;
    if (Tile::kRows % Shape::kDown != 0 && row + down >= Tile::kRows) break;
#pragma unroll
    for (int c = 0; c < Tile::kCols; c += Tile::kPanel) {
      const u32 at = to + u32(c * Tile::kRows * 2 + down * Tile::kPanel * 2);
      if (kBounded || Tile::kCols != kDim) {
        const bool exists = (!kBounded || row + down < exist) && (Tile::kCols == kDim || c + col < kDim);
        ptx::cp_async_16(at, exists ? from + c : nullptr, exists ? 16u : 0u);
      } else {
        ptx::cp_async_16(at, from + c);
      }
    }
    from += Shape::kDown * row_stride;
  }
}

}  // namespace strobe
