// Memory instructions that C++ has no words for: pairs from shared memory, reads without a branch, and those by which
// thread blocks add to one result in global memory. Sections are those of the PTX ISA manual.
#pragma once

#include "core/base.h"

namespace strobe::ptx {

// "Data Movement and Conversion Instructions: ld", shared and 64 bits wide.
__device__ __forceinline__ float2 ld_shared_8(u32 shared) {
  float2 x;
  asm volatile("ld.shared.v2.f32 {%0,%1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(shared) : "memory");
  return x;
}

// Zeros where not `there`, which is then not read. "ld", behind a predicate: an `if` would be a branch, and loads that
// follow it would wait for it.
__device__ __forceinline__ float4 ld_global_16(const float* from, bool there) {
  float4 x = make_float4(0.f, 0.f, 0.f, 0.f);
  asm volatile("{\n.reg .pred p;\nsetp.ne.s32 p, %5, 0;\n@p ld.global.v4.f32 {%0,%1,%2,%3}, [%4];\n}"
               : "+f"(x.x), "+f"(x.y), "+f"(x.z), "+f"(x.w)
               : "l"(from), "r"(int(there)));
  return x;
}

// Waits for every copy that this thread has begun. "cp.async.wait_all".
__device__ __forceinline__ void cp_async_wait_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// "Parallel Synchronization and Communication Instructions: red".
__device__ __forceinline__ void red_add(float* to, float x) {
  asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(to), "f"(x) : "memory");
}
#if __CUDA_ARCH__ >= 900
__device__ __forceinline__ void red_add_v4(float* to, const float (&x)[4]) {
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1,%2,%3,%4};" ::"l"(to), "f"(x[0]), "f"(x[1]), "f"(x[2]),
               "f"(x[3])
               : "memory");
}
#endif

// "Memory Consistency Model": what was stored before the release is seen after the acquire.
__device__ __forceinline__ u32 ld_acquire(const u32* from) {
  u32 x;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(from) : "memory");
  return x;
}
__device__ __forceinline__ void st_release(u32* to, u32 x) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(x) : "memory");
}

}  // namespace strobe::ptx
