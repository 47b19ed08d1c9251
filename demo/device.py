"""Where the demo runs, and how large it is there."""

from typing import NamedTuple

import torch

import strobe

CPU_CONTEXT = 256
F32, BF16 = torch.finfo(torch.float32).eps, torch.finfo(torch.bfloat16).eps


class Device(NamedTuple):
    name: str  # "cpu" or "cuda"
    label: str  # for people
    note: str  # why it is not a GPU, or ""
    dtype: torch.dtype  # of q, k and v
    context: int  # bytes that a training sequence holds
    tokens: int  # bytes in a training step
    lengths: tuple  # sequence lengths of the time and memory plots
    gradient: float  # what rounding may do to the loss and, relative, to the gradients of a step
    logits: float  # what it may do to logits


def device() -> Device:
    """A GPU if Strobe has an engine for it, else the CPU, with the reason."""
    cpu = Device(
        "cpu", f"{strobe.cpu_isa()}, {torch.get_num_threads()} threads", "", torch.float32, CPU_CONTEXT, 2048,
        (512, 1024, 2048, 4096, 8192), 100 * F32, 2000 * F32,
    )  # fmt: skip
    if not torch.cuda.is_available():
        return cpu
    try:
        probe = torch.zeros(1, 1, 1, 32, dtype=torch.bfloat16, device="cuda")
        strobe.flash_attn_func(probe, probe, probe)
    except Exception as refused:  # whatever stops a GPU from being used is a reason to go on without it
        return cpu._replace(note=f"Strobe has no engine for {torch.cuda.get_device_name()} yet: {refused}")
    label = torch.cuda.get_device_name()
    return Device(
        "cuda", label, "", torch.bfloat16, 4 * CPU_CONTEXT, 16384, (1024, 2048, 4096, 8192, 16384), BF16, 32 * BF16
    )
