// Working memory that each thread keeps between calls: 64-byte aligned, no system call once warm.
#pragma once

#include <cstdlib>
#include <new>

#include "simd.h"

namespace strobe::cpu::STROBE_ISA {

// Blocks of doubling size; a pointer stays valid while its Scratch lives.
struct Arena {
  static constexpr int kBlocks = 40;
  static constexpr i64 kFirstBytes = i64(1) << 20;
  char* block[kBlocks] = {};
  int current = 0;
  i64 used = 0;
  ~Arena() {
    for (char* b : block) std::free(b);
  }
  void* take(i64 bytes) {
    bytes = round_up(bytes, 64);
    while (used + bytes > kFirstBytes << current) {
      ++current;
      used = 0;
    }
    if (!block[current]) {
      block[current] = static_cast<char*>(std::aligned_alloc(4096, size_t(kFirstBytes << current)));
      if (!block[current]) throw std::bad_alloc();
    }
    void* p = block[current] + used;
    used += bytes;
    return p;
  }
};

inline thread_local Arena thread_arena;

// What is taken from it is given back when it goes out of scope. Scopes nest.
class Scratch {
 public:
  Scratch() : arena_(thread_arena), current_(arena_.current), used_(arena_.used) {}
  ~Scratch() {
    arena_.current = current_;
    arena_.used = used_;
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  template <class T>
  T* take(i64 n) {
    return static_cast<T*>(arena_.take(n * i64(sizeof(T))));
  }

 private:
  Arena& arena_;
  int current_;
  i64 used_;
};

}  // namespace strobe::cpu::STROBE_ISA
