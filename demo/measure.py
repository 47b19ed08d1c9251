"""Time and memory of attention alone, forward + backward, and of a training step, beside SDPA."""

import ctypes
import gc
import time

import torch
import torch.nn.functional as F
from model import DIM, DIM_V, FULL, HEADS, HEADS_K, HEADS_V, WINDOWED, dense_bias, for_sdpa

import strobe

MIB = 2**20


def _status(name: str) -> int:
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def peak_memory(work, on_gpu: bool) -> float:
    """MiB that `work` needs on top of what is held before: of the process (Linux), or of PyTorch's GPU allocator."""
    dense_bias.cache_clear()  # the mask that SDPA needs counts as memory; timed runs find it made
    gc.collect()
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - held) / MIB
    ctypes.CDLL(None).malloc_trim(0)  # what earlier work freed must not hide what this work needs
    with open("/proc/self/clear_refs", "w") as refs:
        refs.write("5")  # the peak starts again from here
    held = _status("VmRSS")
    work()
    return max(_status("VmHWM") - held, 0) / MIB


def seconds(work, on_gpu: bool, budget: float = 0.4) -> float:
    """The best of as many runs as fit in the budget, at least one. `work` has run before."""
    best, spent = float("inf"), 0.0
    while spent < budget:
        if on_gpu:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        work()
        if on_gpu:
            torch.cuda.synchronize()
        took = time.perf_counter() - begin
        best, spent = min(best, took), spent + took
    return best


def strobe_once(q, k, v, mask):
    strobe.flash_attn_func(q, k, v, **mask.options()).sum().backward()


def sdpa_once(q, k, v, mask):
    """SDPA at its best: heads repeated and head_dim padded to head_dim_v, so that its flash kernel takes the call."""
    dense = None if mask == FULL else dense_bias(q.shape[1], mask, None, q.dtype, q.device)
    options = {"attn_mask": dense, "is_causal": dense is None, "scale": q.shape[-1] ** -0.5}
    F.scaled_dot_product_attention(*for_sdpa(q, k, v), **options).sum().backward()


# name -> (colour, how, mask)
CURVES = {
    "Strobe, window + kept": ("kept", strobe_once, WINDOWED),
    "Strobe, causal": ("full", strobe_once, FULL),
    "SDPA, causal": ("peer", sdpa_once, FULL),
    "SDPA, window + kept": ("peer2", sdpa_once, WINDOWED),
}


def attention_curves(where, tick=lambda name: None) -> dict:
    """Curve name -> [(sequence length, ms, MiB)], forward + backward of one layer's attention, batch 1."""
    on_gpu, curves = where.name == "cuda", {name: [] for name in CURVES}
    for n in where.lengths:
        for name, (_, once, mask) in CURVES.items():
            tick(f"{name}, {n}")
            shapes = ((HEADS, DIM), (HEADS_K, DIM), (HEADS_V, DIM_V))
            q, k, v = (
                torch.randn(1, n, *shape, device=where.name, dtype=where.dtype, requires_grad=True) for shape in shapes
            )

            def work(q=q, k=k, v=v, once=once, mask=mask):
                once(q, k, v, mask)
                q.grad = k.grad = v.grad = None

            memory = peak_memory(work, on_gpu)
            curves[name].append((n, seconds(work, on_gpu) * 1e3, memory))
    return curves


def training_step(model, batch, loss_of, attention, where) -> tuple[float, float]:
    """(ms, MiB) of the loss and the gradients of one batch."""

    def work():
        loss_of(model, batch, attention=attention).backward()
        model.zero_grad()

    on_gpu = where.name == "cuda"
    memory = peak_memory(work, on_gpu)
    return seconds(work, on_gpu) * 1e3, memory
