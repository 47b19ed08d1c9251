// Arithmetic instructions, one function each: matrix multiply, 2^x, and conversions between f32 and pairs of 16-bit
// elements. Sections are those of the PTX ISA manual.
#pragma once

#include "core/base.h"

namespace strobe::ptx {

template <DType kType>
struct TypeName;
template <>
struct TypeName<DType::bf16> {
  static constexpr char value[] = "bf16";
};
template <>
struct TypeName<DType::f16> {
  static constexpr char value[] = "f16";
};

// d += a * b, 16 x 8 x 16. "Matrix Fragments for mma.m16n8k16 with floating point type".
template <DType kType>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.%10.%10.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "C"(TypeName<kType>::value));
}

// "Floating Point Instructions: ex2".
__device__ __forceinline__ float ex2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// "Floating Point Instructions: lg2".
__device__ __forceinline__ float lg2(float x) {
  float y;
  asm("lg2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// "Floating Point Instructions: rcp".
__device__ __forceinline__ float rcp(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The lowest n bits: all of them from 32 on, none below 1. "Integer Arithmetic Instructions: bmsk".
__device__ __forceinline__ u32 low_bits(i32 n) {
  u32 bits;
  asm("bmsk.clamp.b32 %0, 0, %1;" : "=r"(bits) : "r"(max(n, 0)));
  return bits;
}

// Two elements in one register, `low` in the low half. "Data Movement and Conversion Instructions: cvt".
template <DType kType>
__device__ __forceinline__ u32 cvt_pair(float low, float high) {
  u32 pair;
  asm("cvt.rn.%3x2.f32 %0, %2, %1;" : "=r"(pair) : "f"(low), "f"(high), "C"(TypeName<kType>::value));
  return pair;
}

// One element to f32. "Data Movement and Conversion Instructions: cvt".
template <DType kType>
__device__ __forceinline__ float cvt_f32(u16 x) {
  if constexpr (kType == DType::bf16) {
    return __uint_as_float(u32(x) << 16);
  } else {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
  }
}

}  // namespace strobe::ptx
