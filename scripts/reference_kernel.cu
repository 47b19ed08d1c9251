// Compiled by check_kernels.py to see how fast a machine compiles: attention's kinds of instructions, unrolled, in a
// text that never changes.
extern "C" __global__ void reference(float* out, const float* in, int tiles) {
  float s[64], sum = 0.f, most = -1e30f;
  float o[64] = {};
  for (int tile = 0; tile < tiles; ++tile) {
#pragma unroll
    for (int step = 0; step < 4; ++step) {
#pragma unroll
      for (int i = 0; i < 64; ++i) s[i] = in[((tile * 4 + step) * 64 + i) * 128 + threadIdx.x];
#pragma unroll
      for (int i = 0; i < 64; ++i) most = fmaxf(most, s[i]);
#pragma unroll
      for (int i = 0; i < 64; ++i) {
        s[i] = exp2f(s[i] - most);
        sum += s[i];
      }
#pragma unroll
      for (int i = 0; i < 64; i += 4)
#pragma unroll
        for (int k = 0; k < 16; k += 4)
          asm volatile(
              "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
              "{%0,%1,%2,%3};"
              : "+f"(o[i]), "+f"(o[i + 1]), "+f"(o[i + 2]), "+f"(o[i + 3])
              : "r"(__float_as_uint(s[k])), "r"(__float_as_uint(s[k + 1])), "r"(__float_as_uint(s[k + 2])),
                "r"(__float_as_uint(s[k + 3])), "r"(__float_as_uint(s[i])), "r"(__float_as_uint(s[i + 1])));
    }
  }
#pragma unroll
  for (int i = 0; i < 64; ++i) out[i * 128 + threadIdx.x] = o[i] / sum;
}
