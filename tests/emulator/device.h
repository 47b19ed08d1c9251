// One thread block, or a cluster of them, on the CPU, so that a kernel's protocol runs where there is no GPU: every
// thread is a fiber, and at each place where a GPU's threads may wait, another one is picked at random. Tensor copies
// land at random later times, and multiplications read their operands at random between their issue and their wait:
// what hardware leaves open is left open here, too. Arithmetic is not timed, and proxies and memory order are not
// modelled.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __shared__
#define __grid_constant__
#define __forceinline__ inline
#define __align__(bytes)
#define __launch_bounds__(...)

struct Dim3 {
  unsigned x = 0, y = 0, z = 0;
};
struct uint4 {
  unsigned x, y, z, w;
};
struct uint2 {
  unsigned x, y;
};
struct float2 {
  float x, y;
};
struct float4 {
  float x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }

namespace emulator {

constexpr int kWarp = 32;
constexpr unsigned kSharedBase = 1024, kSharedBytes = 232448;

// A transaction barrier in shared memory.
struct Barrier {
  unsigned arrivals = 0, pending = 0, phase = 0;
  long bytes = 0;
};
struct NamedBarrier {
  unsigned arrived = 0, generation = 0;
};

// What the lanes of a warp exchange: double-buffered, since nobody can be two rounds ahead.
struct Warp {
  uint64_t value[2][kWarp];
  unsigned arrived = 0, round = 0;
};

// A wgmma that was issued and has not been waited for.
struct Multiplication {
  std::function<void()> run;
  bool done = false;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  unsigned thread = 0;
  bool finished = false;
  std::vector<Multiplication> group;                // since the last commit
  std::vector<std::vector<Multiplication>> groups;  // committed
  // Copies from shared memory that have not ended: those since the last commit, and the committed ones.
  std::shared_ptr<int> stores = std::make_shared<int>(0);
  std::vector<std::shared_ptr<int>> store_groups;
};

class Block;

// Blocks that run at the same time.
struct Cluster {
  std::vector<std::unique_ptr<Block>> blocks;
  unsigned arrived = 0, generation = 0;  // threads, at the barrier of all of them

  Cluster(unsigned size, unsigned seed);
  // Runs `kernel` once for each thread of blocks `index` and following. False if every thread waits for another one.
  bool run(unsigned threads, unsigned index, unsigned grid, const std::function<void()>& kernel);
};

class Block {
 public:
  Block(Cluster& of, unsigned seed) : random(seed), cluster(of) {}

  void start(unsigned threads, unsigned index, unsigned grid, const std::function<void()>& kernel);
  // Every warp takes a turn, and copies land.
  void round();
  void land();
  // Where this block's shared memory is now.
  unsigned char* memory();

  Fiber& fiber() { return *fibers[current]; }
  void yield() { swapcontext(&fiber().context, &scheduler); }
  template <class Ready>
  void wait(Ready ready) {
    if (chance(4)) yield();
    while (!ready()) yield();
    moved = true;
  }
  bool ended() const { return left == 0; }
  bool chance(unsigned one_in) { return random() % one_in == 0; }

  // Every lane's value, once all of them are here.
  uint64_t (&exchange(uint64_t value))[kWarp];

  std::mt19937 random;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Warp> warps;
  std::map<unsigned, Barrier> barriers;
  std::map<unsigned, NamedBarrier> named;
  std::vector<std::function<void()>> copies;  // on their way
  Cluster& cluster;
  unsigned current = 0, index = 0, grid = 0, left = 0;  // left: threads that have not ended
  unsigned away = 0;   // rounds that it still stands still, while the other block of its cluster goes on
  bool moved = false;  // somebody went on since the last round

 private:
  static void enter();
  void resume();  // its memory takes the place that the kernel knows
  std::vector<unsigned char> saved_;
  ucontext_t scheduler;
  std::function<void()> kernel_;
};

extern Block* block;  // that runs now

struct ThreadIndex {
  struct X {
    operator unsigned() const { return block->fiber().thread; }
  } x;
};
struct BlockIndex {
  struct X {
    operator unsigned() const { return block->index; }
  } x;
};
struct GridSize {
  struct X {
    operator unsigned() const { return block->grid; }
  } x;
};

template <class T>
uint64_t pack(T value) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}
template <class T>
T unpack(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline unsigned lane() { return block->fiber().thread % kWarp; }

}  // namespace emulator

inline constexpr emulator::ThreadIndex threadIdx{};
inline constexpr emulator::BlockIndex blockIdx{};
inline constexpr emulator::GridSize gridDim{};

inline void __syncwarp() { emulator::block->exchange(0); }
template <class T>
T __shfl_sync(unsigned, T value, int source, int width = emulator::kWarp) {
  const unsigned lane = emulator::lane();
  return emulator::unpack<T>(emulator::block->exchange(emulator::pack(value))[lane / width * width + source % width]);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  const unsigned lane = emulator::lane();
  return emulator::unpack<T>(emulator::block->exchange(emulator::pack(value))[lane ^ mask]);
}
template <class T>
T __shfl_up_sync(unsigned, T value, int delta) {
  const int lane = int(emulator::lane());
  return emulator::unpack<T>(emulator::block->exchange(emulator::pack(value))[lane >= delta ? lane - delta : lane]);
}
inline unsigned __ballot_sync(unsigned, bool held) {
  auto& values = emulator::block->exchange(held);
  unsigned bits = 0;
  for (int i = 0; i < emulator::kWarp; ++i) bits |= unsigned(values[i] != 0) << i;
  return bits;
}
inline bool __any_sync(unsigned mask, bool held) { return __ballot_sync(mask, held) != 0; }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline unsigned atomicAdd(unsigned* at, unsigned value) {
  const unsigned old = *at;
  *at += value;
  return old;
}

namespace emulator {
void named_barrier(unsigned id, unsigned threads, bool waits);
}
inline void __syncthreads() { emulator::named_barrier(0, unsigned(emulator::block->fibers.size()), true); }
