// Stands in for src/cuda/ptx/wgmma.cuh.
#pragma once

#include "cuda/tile/fragment.cuh"

namespace strobe::ptx {

template <int kN>
void pin(Fragment<16, kN>&) {}
template <int kK>
void pin(Operand<16, kK>&) {}
inline void wgmma_fence() {}
inline void wgmma_commit() {
  emulator::Fiber& f = emulator::block->fiber();
  f.groups.push_back(std::move(f.group));
  f.group.clear();
}
// A multiplication reads its operands at some time after its issue and before the end of the wait for it.
template <int kPending>
void wgmma_wait() {
  emulator::Fiber& f = emulator::block->fiber();
  emulator::block->wait([] { return true; });
  emulator::block->exchange(0);  // operands lie in the registers of all lanes
  const bool late = emulator::block->exchange(emulator::block->random())[0] % 2;
  const size_t wanted = f.groups.size() <= kPending ? 0 : f.groups.size() - kPending;
  for (size_t g = 0; g < (late ? wanted : f.groups.size()); ++g)
    for (emulator::Multiplication& m : f.groups[g]) {
      if (!m.done) m.run();
      m.done = true;
    }
  emulator::block->exchange(0);
  f.groups.erase(f.groups.begin(), f.groups.begin() + long(wanted));
}

inline u64 matrix_descriptor(u32 shared, u32 panel = 16) {
  return u64((shared & 0x3FFFF) >> 4) | u64(panel >> 4) << 16 | u64(1024 >> 4) << 32 | u64(1) << 62;
}
inline float element(u32 shared) {
  u16 x;
  std::memcpy(&x, at(shared ^ (shared >> 7 & 7) << 4, 2), 2);
  return widen(x);
}
inline u32 start_of(u64 descriptor) { return u32(descriptor & 0x3FFF) << 4; }
// Rows along k, and rows along n in panels of 64 columns.
inline u32 along_k(u64 d, int row, int k) { return start_of(d) + u32(row / 8 * 1024 + row % 8 * 128 + k * 2); }
inline u32 along_n(u64 d, int k, int n) {
  const u32 panel = u32(d >> 16 & 0x3FFF) << 4;
  return start_of(d) + u32(n / 64) * panel + u32(k / 8 * 1024 + k % 8 * 128 + n % 64 * 2);
}

template <DType kType, int kN>
struct Wgmma {
  using F = Fragment<16, kN>;
  static void ss(F& d, u64 a, u64 b, i32 add) {
    const int warp_row = int(threadIdx.x / 32 % 4) * 16;
    emulator::block->fiber().group.push_back({[=, &d] {
      for (int r = 0; r < 2; ++r)
        for (int c = 0; c < F::kCols; ++c) {
          float sum = add ? d.at(r, c) : 0.f;
          for (int k = 0; k < 16; ++k)
            sum += element(along_k(a, warp_row + F::row(r), k)) * element(along_k(b, F::col(c), k));
          d.at(r, c) = sum;
        }
    }});
  }
  static void rs(F& d, const u32 (&a)[4], u64 b) {
    // The left operand's row lies in four lanes: each hands out where its part is.
    const auto& lanes = emulator::block->exchange(reinterpret_cast<u64>(&a[0]));
    const u32* quad[4];
    for (int i = 0; i < 4; ++i) quad[i] = reinterpret_cast<const u32*>(lanes[lane_id() / 4 * 4 + i]);
    const u32 *q0 = quad[0], *q1 = quad[1], *q2 = quad[2], *q3 = quad[3];
    emulator::block->fiber().group.push_back({[=, &d] {
      const u32* const from[4] = {q0, q1, q2, q3};
      for (int r = 0; r < 2; ++r)
        for (int c = 0; c < F::kCols; ++c) {
          float sum = d.at(r, c);
          for (int k = 0; k < 16; ++k) {
            const u32 pair = from[k % 8 / 2][k / 8 * 2 + r];
            sum += widen(u16(k % 2 ? pair >> 16 : pair)) * element(along_n(b, k, F::col(c)));
          }
          d.at(r, c) = sum;
        }
    }});
  }
};

}  // namespace strobe::ptx
