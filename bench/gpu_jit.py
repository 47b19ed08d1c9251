"""What the first calls of this process take, in seconds, as JSON: python -m bench.gpu_jit new|again. STROBE_CACHE_DIR
decides whether their kernels have been compiled before."""

import json
import sys
import time
from dataclasses import replace

import torch

from bench.gpu import jit
from bench.gpu_inputs import make_inputs
from bench.gpu_peers import SYSTEMS


def first_call(task, what):
    """Seconds until the results are there. Prompts in pages are calls on a cache."""
    task = replace(task, kind="decode" if task.case.page_size else what)
    prepared = SYSTEMS["strobe"](task, make_inputs(task, "cuda"))
    torch.cuda.synchronize()
    start = time.perf_counter()
    with torch.set_grad_enabled(what == "backward"):
        prepared.call()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def main():
    # PyTorch's own threads and kernels, and the modules that it imports at a first gradient (over a second).
    x = torch.randn(8, device="cuda", requires_grad=True)
    torch.autograd.grad(x * 2, x, torch.ones_like(x))
    seconds = {}
    for task in jit():
        when, what = task.kind.split("_")
        if when == sys.argv[1]:
            seconds[task.name] = first_call(task, what)
    print(json.dumps(seconds))


if __name__ == "__main__":
    main()
