"""The CPU tests' oracle on a GPU: the same functions on tensors moved there, with the mask computed at once."""

from dataclasses import fields, replace

import torch

import reference
from cache_cases import make_cache
from cases import make_inputs

INF = float("inf")


def visible(seqlen_q, seqlen_k, causal=False, window=(-1, -1), keep_first=0, force_fa_decode=False, full_from=None):
    """reference.visible() without its loops, which take seconds at a GPU's lengths; masks.py compares the two."""
    left, right = (INF if side < 0 else side for side in window)
    if causal:
        right = 0
    if force_fa_decode and seqlen_q == 1:
        left = INF
    i, j = torch.arange(seqlen_q).double()[:, None], torch.arange(seqlen_k).double()[None]
    at = i + (seqlen_k - seqlen_q)
    row_left = torch.full_like(i, left)
    if full_from is not None:
        row_left = row_left.masked_fill(i >= full_from, INF)
    in_window = j >= (at - row_left).clamp(min=0)
    return (j <= at + right) & (in_window | (j < keep_first))


def mask_of(problem, b):
    if not hasattr(problem, "masks"):
        problem.masks = {}
    if b not in problem.masks:
        problem.masks[b] = visible(
            len(problem.q_rows[b]),
            len(problem.k_rows[b]),
            problem.causal,
            problem.window,
            problem.keep_first,
            problem.force_fa_decode,
            None if problem.full_from is None else problem.full_from[b],
        )
    return problem.masks[b]


reference.mask_of = mask_of


def honest_matmuls():
    """The error budget is what plain PyTorch loses in a dtype, not what its shortcuts lose beyond that."""
    matmul = torch.backends.cuda.matmul
    matmul.allow_tf32 = False
    matmul.allow_bf16_reduced_precision_reduction = False
    matmul.allow_fp16_reduced_precision_reduction = False


def moved(value, device):
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, list) and value and isinstance(value[0], torch.Tensor):
        return [x.to(device) for x in value]
    if isinstance(value, reference.Problem):
        return replace(value, **{f.name: moved(getattr(value, f.name), device) for f in fields(value)})
    return value


def aligned_strides(values, how):
    """cases.strided_like() with what engines for GPUs ask for: rows that begin at multiples of 16 bytes."""
    if how == "sliced":
        *lead, rows, heads, dim = values.shape
        wide = values.new_full((*lead, rows + 1, heads + 1, dim + 16), float("nan"))
        wide[..., :rows, 1:, 8 : dim + 8] = values
        return wide[..., :rows, 1:, 8 : dim + 8]
    return values.transpose(-3, -2).contiguous().transpose(-3, -2) if how else values


def attention_inputs(case, seed, device):
    with torch.device("cpu"):  # where the generator of their values is
        inputs = make_inputs(replace(case, strided=None), seed)
    inputs = replace(inputs, case=case, **{f.name: moved(getattr(inputs, f.name), device) for f in fields(inputs)[1:]})
    if not case.strided:
        return inputs
    strided = {name: aligned_strides(getattr(inputs, name), case.strided) for name in ("q", "k", "v", "dout")}
    return replace(inputs, **strided)


def cache_inputs(case, seed, device):
    with torch.device("cpu"):
        inputs = make_cache(case, seed)
    return replace(inputs, **{f.name: moved(getattr(inputs, f.name), device) for f in fields(inputs)[1:]})


def storages(inputs):
    """Everything that a call may read, what lies between strides too, as bytes."""
    tensors = [getattr(inputs, f.name) for f in fields(inputs)]
    return [
        torch.empty(0, dtype=torch.uint8, device=t.device).set_(t.untyped_storage())
        for t in tensors
        if isinstance(t, torch.Tensor)
    ]
