"""A kernel with a mistake in it, for compute-sanitizer to find: sanitizer_planted.py TOOL. Shows that the tools see."""

import contextlib
import sys

import torch

# Its name begins like those that the tools are told to watch.
SOURCE = """
extern "C" __global__ void strobe_planted(int mistake, int* values, int* result) {
  __shared__ int shared[64];
  if (mistake == 0) values[threadIdx.x + (1 << 20)] = 1;
  if (mistake == 1) {
    shared[threadIdx.x] = threadIdx.x;
    result[threadIdx.x] = shared[63 - threadIdx.x];
  }
  if (mistake == 2) __syncwarp(1u << (threadIdx.x + 1) % 32);
  if (mistake == 3) result[threadIdx.x] = values[threadIdx.x];
}
"""


def main():
    mistake = ("memcheck", "racecheck", "synccheck", "initcheck").index(sys.argv[1])
    kernel = torch.cuda._compile_kernel(SOURCE, "strobe_planted")
    values, result = (torch.empty(64, dtype=torch.int32, device="cuda") for _ in range(2))
    with contextlib.suppress(RuntimeError):  # the tool ends the kernel at some mistakes
        kernel(grid=(1, 1, 1), block=(64, 1, 1), args=[mistake, values, result])
        torch.cuda.synchronize()
    print("1 calls, 0 refused")


if __name__ == "__main__":
    main()
