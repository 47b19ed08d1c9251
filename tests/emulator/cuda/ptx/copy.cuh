// Stands in for src/cuda/ptx/copy.cuh.
#pragma once

#include "core/base.h"
#include "device.h"

namespace strobe {

extern unsigned char smem[];
inline float fmaxf(float a, float b) { return std::fmax(a, b); }

namespace ptx {

inline u32 shared_address(const void* p) {
  return u32(static_cast<const unsigned char*>(p) - smem) + emulator::kSharedBase;
}
inline unsigned char* at(u32 shared, u32 bytes) {
  if (shared < emulator::kSharedBase || shared + bytes > emulator::kSharedBase + emulator::kSharedBytes) {
    std::printf("FAILED shared memory is read or written outside of a block's\n");
    std::exit(1);
  }
  return smem + (shared - emulator::kSharedBase);
}
inline void st_shared_16(u32 shared, uint4 x) { std::memcpy(at(shared, 16), &x, 16); }
inline uint4 ld_shared_16(u32 shared) {
  uint4 x;
  std::memcpy(&x, at(shared, 16), 16);
  return x;
}
inline void opaque(u32&) {}
inline void opaque(u64&) {}
inline void opaque(i64&) {}
// Lane l gives the address of row l % 8 of matrix l / 8.
inline void ldmatrix_x4(u32 (&r)[4], u32 shared) {
  const auto& addresses = emulator::block->exchange(shared);
  for (unsigned m = 0; m < 4; ++m)
    std::memcpy(&r[m], at(u32(addresses[m * 8 + emulator::lane() / 4]) + emulator::lane() % 4 * 4, 4), 4);
}
inline void stmatrix_x4(u32 shared, const u32 (&r)[4]) {
  const auto& addresses = emulator::block->exchange(shared);
  for (unsigned m = 0; m < 4; ++m)
    std::memcpy(at(u32(addresses[m * 8 + emulator::lane() / 4]) + emulator::lane() % 4 * 4, 4), &r[m], 4);
}
// Not of this emulator: the declarations that other files need.
void ldmatrix_x4_trans(u32 (&r)[4], u32 shared);
void st_shared_4(u32 shared, u32 x);

}  // namespace ptx
}  // namespace strobe
