// Data movement instructions, one function each. Shared-memory addresses are 32-bit. Sections are those of the PTX ISA
// manual.
#pragma once

#include "core/base.h"

namespace strobe::ptx {

// "Data Movement and Conversion Instructions: cvta".
__device__ __forceinline__ u32 shared_address(const void* p) { return static_cast<u32>(__cvta_generic_to_shared(p)); }

// Hides where a value came from: nothing computed from it leaves the loop that this stands in, and no code is copied
// for a value that is known.
__device__ __forceinline__ void opaque(u32& x) { asm volatile("" : "+r"(x)); }
__device__ __forceinline__ void opaque(u64& x) { asm volatile("" : "+l"(x)); }
__device__ __forceinline__ void opaque(i64& x) { asm volatile("" : "+l"(x)); }

// 16 bytes to shared memory, of which `bytes` (0 or 16) are read and the rest are zeros. "cp.async".
__device__ __forceinline__ void cp_async_16(u32 shared, const void* global, u32 bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void cp_async_16(u32 shared, const void* global) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
}

// 4 bytes to shared memory, of which `bytes` (0 or 4) are read. "cp.async".
__device__ __forceinline__ void cp_async_4(u32 shared, const void* global, u32 bytes) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared), "l"(global), "r"(bytes) : "memory");
}

// "cp.async.commit_group".
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kPending of the newest groups are unfinished. "cp.async.wait_group".
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8 x 8 matrices; lane l gives the address of row l % 8 of matrix l / 8. "ldmatrix".
__device__ __forceinline__ void ldmatrix_x4(u32 (&r)[4], u32 shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared)
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(u32 (&r)[4], u32 shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared)
               : "memory");
}

#if __CUDA_ARCH__ >= 900
// ldmatrix_x4 the other way. "stmatrix".
__device__ __forceinline__ void stmatrix_x4(u32 shared, const u32 (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(shared), "r"(r[0]), "r"(r[1]),
               "r"(r[2]), "r"(r[3])
               : "memory");
}
#endif

// "Data Movement and Conversion Instructions: ld", shared and 128 bits wide.
__device__ __forceinline__ uint4 ld_shared_16(u32 shared) {
  uint4 x;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(shared)
               : "memory");
  return x;
}

// "Data Movement and Conversion Instructions: st", shared.
__device__ __forceinline__ void st_shared_4(u32 shared, u32 x) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(shared), "r"(x) : "memory");
}
__device__ __forceinline__ void st_shared_16(u32 shared, uint4 x) {
  asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(shared), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
               : "memory");
}

}  // namespace strobe::ptx
