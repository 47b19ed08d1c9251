// Warpgroup matrix multiplication, asynchronous, of m64nNk16 for every N that is a multiple of 16 up to 256. Sections
// are those of the PTX ISA manual, "Asynchronous Warpgroup Level Matrix Instructions".
#pragma once

#include "cuda/tile/fragment.cuh"

namespace strobe::ptx {

// "wgmma.fence", "wgmma.commit_group", "wgmma.wait_group".
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Ties registers to this point of the program: the compiler must not move their uses across a wait.
template <int kN>
__device__ __forceinline__ void pin(Fragment<16, kN>& f) {
#pragma unroll
  for (int n = 0; n < kN / 8; ++n) {
    float (&x)[4] = f.x[0][n];
    asm volatile("" : "+f"(x[0]), "+f"(x[1]), "+f"(x[2]), "+f"(x[3]));
  }
}
template <int kK>
__device__ __forceinline__ void pin(Operand<16, kK>& a) {
#pragma unroll
  for (int k = 0; k < kK / 16; ++k) {
    u32(&x)[4] = a.x[0][k];
    asm volatile("" : "+r"(x[0]), "+r"(x[1]), "+r"(x[2]), "+r"(x[3]));
  }
}

// "Shared Memory Matrix Layout", "Matrix Descriptor Format": 128-byte swizzle, 8 rows are 1024 bytes apart. Rows that
// run along k need no other distance; where they run along n, `panel` is that of panels of 64 columns.
__device__ __forceinline__ u64 matrix_descriptor(u32 shared, u32 panel = 16) {
  return u64((shared & 0x3FFFF) >> 4) | u64(panel >> 4) << 16 | u64(1024 >> 4) << 32 | u64(1) << 62;
}

// d (+)= a b: `ss` takes a from shared memory, rows along k, as b is; `rs` takes a from registers and b with rows along
// n. A warp's part of d is a fragment of its 16 rows.
template <DType kType, int kN>
struct Wgmma;

// clang-format off
#define STROBE_D(i) "+f"(d.x[0][i][0]), "+f"(d.x[0][i][1]), "+f"(d.x[0][i][2]), "+f"(d.x[0][i][3]), \
                    "+f"(d.x[0][i + 1][0]), "+f"(d.x[0][i + 1][1]), "+f"(d.x[0][i + 1][2]), "+f"(d.x[0][i + 1][3])
#define STROBE_R0 "%0,%1,%2,%3,%4,%5,%6,%7"
#define STROBE_R1 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define STROBE_R2 ",%16,%17,%18,%19,%20,%21,%22,%23"
#define STROBE_R3 ",%24,%25,%26,%27,%28,%29,%30,%31"
#define STROBE_R4 ",%32,%33,%34,%35,%36,%37,%38,%39"
#define STROBE_R5 ",%40,%41,%42,%43,%44,%45,%46,%47"
#define STROBE_R6 ",%48,%49,%50,%51,%52,%53,%54,%55"
#define STROBE_R7 ",%56,%57,%58,%59,%60,%61,%62,%63"
#define STROBE_R8 ",%64,%65,%66,%67,%68,%69,%70,%71"
#define STROBE_R9 ",%72,%73,%74,%75,%76,%77,%78,%79"
#define STROBE_R10 ",%80,%81,%82,%83,%84,%85,%86,%87"
#define STROBE_R11 ",%88,%89,%90,%91,%92,%93,%94,%95"
#define STROBE_R12 ",%96,%97,%98,%99,%100,%101,%102,%103"
#define STROBE_R13 ",%104,%105,%106,%107,%108,%109,%110,%111"
#define STROBE_R14 ",%112,%113,%114,%115,%116,%117,%118,%119"
#define STROBE_R15 ",%120,%121,%122,%123,%124,%125,%126,%127"
#define STROBE_WGMMA(N, R, s0, s1, s2, s3, r4, r5, r6, ...)                                                            \
  template <DType kType>                                                                                             \
  struct Wgmma<kType, N> {                                                                                           \
    __device__ __forceinline__ static void ss(Fragment<16, N>& d, u64 a, u64 b, i32 add) {                           \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #s2 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N             \
                   "k16.f32.%" #s3 ".%" #s3 " {" R "}, %" #s0 ", %" #s1 ", p, 1, 1, 0, 0;\n}"                        \
                   : __VA_ARGS__                                                                                     \
                   : "l"(a), "l"(b), "r"(add), "C"(TypeName<kType>::value));                                         \
    }                                                                                                                \
    __device__ __forceinline__ static void rs(Fragment<16, N>& d, const u32 (&a)[4], u64 b) {                        \
      asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.%" #r5 ".%" #r5 " {" R "}, {%" #s0 ",%" #s1 ",%" #s2 \
                   ",%" #s3 "}, %" #r4 ", 1, 1, 1, 1;\n"                                                             \
                   : __VA_ARGS__                                                                                     \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "C"(TypeName<kType>::value));               \
    }                                                                                                                \
  };
STROBE_WGMMA(16, STROBE_R0, 8, 9, 10, 11, 12, 13, 14, STROBE_D(0))
STROBE_WGMMA(32, STROBE_R0 STROBE_R1, 16, 17, 18, 19, 20, 21, 22, STROBE_D(0), STROBE_D(2))
STROBE_WGMMA(48, STROBE_R0 STROBE_R1 STROBE_R2, 24, 25, 26, 27, 28, 29, 30, STROBE_D(0), STROBE_D(2), STROBE_D(4))
STROBE_WGMMA(64, STROBE_R0 STROBE_R1 STROBE_R2 STROBE_R3, 32, 33, 34, 35, 36, 37, 38, STROBE_D(0), STROBE_D(2), STROBE_D(4), STROBE_D(6))
STROBE_WGMMA(80, STROBE_R0 STROBE_R1 STROBE_R2 STROBE_R3 STROBE_R4, 40, 41, 42, 43, 44, 45, 46, STROBE_D(0), STROBE_D(2), STROBE_D(4), STROBE_D(6), STROBE_D(8))
STROBE_WGMMA(96, STROBE_R0 STROBE_R1 STROBE_R2 STROBE_R3 STROBE_R4 STROBE_R5, 48, 49, 50, 51, 52, 53, 54, STROBE_D(0), STROBE_D(2), STROBE_D(4), STROBE_D(6), STROBE_D(8), STROBE_D(10))
STROBE_WGMMA(112, STROBE_R0 STROBE_R1 STROBE_R2 STROBE_R3 STROBE_R4 STROBE_R5 STROBE_R6, 56, 57, 58, 59, 60, 61, 62, STROBE_D(0), STROBE_D(2), STROBE_D(4), STROBE_D(6), STROBE_D(8), STROBE_D(10), STROBE_D(12))
STROBE_WGMMA(128, STROBE_R0 STROBE_R1 STROBE_R2 STROBE_R3 STROBE_R4 STROBE_R5 STROBE_R6 STROBE_R7, 64, 65, 66, 67, 68, 69, 70, STROBE_D(0), STROBE_D(2), STROBE_D(4), STROBE_D(6), STROBE_D(8), STROBE_D(10), STROBE_D(12), STROBE_D(14))
STROBE_WGMMA(144, STROBE_R0 STROBE_R1 STROBE_R2 STROBE_R3 STROBE_R4 STROBE_R5 STROBE_R6 STROBE_R7 STROBE_R8, 72, 73, 74, 75, 76, 77, 78, STROBE_D(0), STROBE_D(2), STROBE_D(4), STROBE_D(6), STROBE_D(8), STROBE_D(10), STROBE_D(12), STROBE_D(14), STROBE_D(16))
STROBE_WGMMA(160, STROBE_R0 STROBE_R1 STROBE_R2 STROBE_R3 STROBE_R4 STROBE_R5 STROBE_R6 STROBE_R7 STROBE_R8 STROBE_R9, 80, 81, 82, 83, 84, 85, 86, STROBE_D(0), STROBE_D(2), STROBE_D(4), STROBE_D(6), STROBE_D(8), STROBE_D(10), STROBE_D(12), STROBE_D(14), STROBE_D(16), STROBE_D(18))
STROBE_WGMMA(176, STROBE_R0 STROBE_R1 STROBE_R2 STROBE_R3 STROBE_R4 STROBE_R5 STROBE_R6 STROBE_R7 STROBE_R8 STROBE_R9 STROBE_R10, 88, 89, 90, 91, 92, 93, 94, STROBE_D(0), STROBE_D(2), STROBE_D(4), STROBE_D(6), STROBE_D(8), STROBE_D(10), STROBE_D(12), STROBE_D(14), STROBE_D(16), STROBE_D(18), STROBE_D(20))
STROBE_WGMMA(192, STROBE_R0 STROBE_R1 STROBE_R2 STROBE_R3 STROBE_R4 STROBE_R5 STROBE_R6 STROBE_R7 STROBE_R8 STROBE_R9 STROBE_R10 STROBE_R11, 96, 97, 98, 99, 100, 101, 102, STROBE_D(0), STROBE_D(2), STROBE_D(4), STROBE_D(6), STROBE_D(8), STROBE_D(10), STROBE_D(12), STROBE_D(14), STROBE_D(16), STROBE_D(18), STROBE_D(20), STROBE_D(22))
STROBE_WGMMA(208, STROBE_R0 STROBE_R1 STROBE_R2 STROBE_R3 STROBE_R4 STROBE_R5 STROBE_R6 STROBE_R7 STROBE_R8 STROBE_R9 STROBE_R10 STROBE_R11 STROBE_R12, 104, 105, 106, 107, 108, 109, 110, STROBE_D(0), STROBE_D(2), STROBE_D(4), STROBE_D(6), STROBE_D(8), STROBE_D(10), STROBE_D(12), STROBE_D(14), STROBE_D(16), STROBE_D(18), STROBE_D(20), STROBE_D(22), STROBE_D(24))
STROBE_WGMMA(224, STROBE_R0 STROBE_R1 STROBE_R2 STROBE_R3 STROBE_R4 STROBE_R5 STROBE_R6 STROBE_R7 STROBE_R8 STROBE_R9 STROBE_R10 STROBE_R11 STROBE_R12 STROBE_R13, 112, 113, 114, 115, 116, 117, 118, STROBE_D(0), STROBE_D(2), STROBE_D(4), STROBE_D(6), STROBE_D(8), STROBE_D(10), STROBE_D(12), STROBE_D(14), STROBE_D(16), STROBE_D(18), STROBE_D(20), STROBE_D(22), STROBE_D(24), STROBE_D(26))
STROBE_WGMMA(240, STROBE_R0 STROBE_R1 STROBE_R2 STROBE_R3 STROBE_R4 STROBE_R5 STROBE_R6 STROBE_R7 STROBE_R8 STROBE_R9 STROBE_R10 STROBE_R11 STROBE_R12 STROBE_R13 STROBE_R14, 120, 121, 122, 123, 124, 125, 126, STROBE_D(0), STROBE_D(2), STROBE_D(4), STROBE_D(6), STROBE_D(8), STROBE_D(10), STROBE_D(12), STROBE_D(14), STROBE_D(16), STROBE_D(18), STROBE_D(20), STROBE_D(22), STROBE_D(24), STROBE_D(26), STROBE_D(28))
STROBE_WGMMA(256, STROBE_R0 STROBE_R1 STROBE_R2 STROBE_R3 STROBE_R4 STROBE_R5 STROBE_R6 STROBE_R7 STROBE_R8 STROBE_R9 STROBE_R10 STROBE_R11 STROBE_R12 STROBE_R13 STROBE_R14 STROBE_R15, 128, 129, 130, 131, 132, 133, 134, STROBE_D(0), STROBE_D(2), STROBE_D(4), STROBE_D(6), STROBE_D(8), STROBE_D(10), STROBE_D(12), STROBE_D(14), STROBE_D(16), STROBE_D(18), STROBE_D(20), STROBE_D(22), STROBE_D(24), STROBE_D(26), STROBE_D(28), STROBE_D(30))
#undef STROBE_WGMMA
#undef STROBE_R0
#undef STROBE_R1
#undef STROBE_R2
#undef STROBE_R3
#undef STROBE_R4
#undef STROBE_R5
#undef STROBE_R6
#undef STROBE_R7
#undef STROBE_R8
#undef STROBE_R9
#undef STROBE_R10
#undef STROBE_R11
#undef STROBE_R12
#undef STROBE_R13
#undef STROBE_R14
#undef STROBE_R15
#undef STROBE_D
// clang-format on

}  // namespace strobe::ptx
