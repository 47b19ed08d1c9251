// A tile of 16-bit elements in shared memory and its only address function. Columns are cut into panels 16, 32 or 64
// wide; within a panel the 16-byte chunks of a row are permuted by the row number, so that the eight rows an ldmatrix
// reads lie in different banks. The permutation is that of the 32-, 64- and 128-byte swizzles of the tensor map.
#pragma once

#include "core/base.h"

namespace strobe {

constexpr int panel_of(int cols) { return cols % 64 == 0 ? 64 : cols % 32 == 0 ? 32 : 16; }

template <int kRows_, int kCols_>
struct SmemTile {
  static constexpr int kRows = kRows_, kCols = kCols_;  // kCols: a multiple of 16
  static constexpr int kPanel = panel_of(kCols);
  static constexpr int kBytes = kRows * kCols * 2;

  u32 base;  // aligned to 1024 bytes

  // Byte offset of element (row, col) from the tile's base; elements of one aligned group of 8 columns are contiguous.
  STROBE_HD static constexpr u32 offset(int row, int col) {
    constexpr int kRowBytes = kPanel * 2, kRowsPerLine = 128 / kRowBytes;
    const int panel = col / kPanel, chunk = col % kPanel / 8;
    const int swizzled = chunk ^ (row / kRowsPerLine % (kPanel / 8));
    return u32(panel * kRows * kRowBytes + row * kRowBytes + swizzled * 16 + col % 8 * 2);
  }
  STROBE_HD constexpr u32 address(int row, int col) const { return base + offset(row, col); }

  // From the address of (row, col) to that of (row + rows, col + cols), for rows a multiple of 8, cols a multiple of 16
  // and col < 16. The permutation repeats every 8 rows and works on bits that no carry reaches, so that a lane keeps
  // one address and loops over constants.
  STROBE_HD static constexpr u32 moved(u32 address, int rows, int cols) {
    const u32 chunk = u32(cols % kPanel / 8) * 16;
    return (address ^ chunk) + u32(cols / kPanel * kRows * kPanel * 2 + rows * kPanel * 2);
  }
};

}  // namespace strobe
