"""What the first calls of this process take, in seconds, as JSON: python -m bench.gpu_jit. STROBE_CACHE_DIR decides
whether their kernels have been compiled before."""

import json
import time

import torch

import strobe

HEAD_DIMS = (72, 104)  # in no list of kernels that ship compiled


def timed(call):
    start = time.perf_counter()
    result = call()
    torch.cuda.synchronize()
    return result, time.perf_counter() - start


def main():
    d, dv = HEAD_DIMS
    q, k, v, dout = (torch.randn(1, 512, 4, n, device="cuda", dtype=torch.bfloat16) for n in (d, d, dv, dv))
    # PyTorch's own threads and kernels, and the modules that it imports at a first gradient (over a second).
    torch.autograd.grad(q.requires_grad_() * 2, q, dout[..., :d])
    torch.cuda.synchronize()
    with torch.no_grad():
        _, forward = timed(lambda: strobe.flash_attn_func(q, k, v, causal=True))
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = strobe.flash_attn_func(*leaves, causal=True)
    torch.cuda.synchronize()
    _, backward = timed(lambda: torch.autograd.grad(out, leaves, dout))
    print(json.dumps({"forward": forward, "backward": backward}))


if __name__ == "__main__":
    main()
