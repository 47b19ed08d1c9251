"""A task's tensors, made on the device: drawing gigabytes on the CPU would take most of a run's time."""

import itertools
from dataclasses import dataclass

import torch

from bench.cases import DTYPES


@dataclass
class Inputs:
    q: torch.Tensor  # [batch, seqlen_q, heads, head_dim], packed [total_q, ...]
    k: torch.Tensor  # as q, or pages [num_pages, page_size, heads_k, head_dim]
    v: torch.Tensor
    dout: torch.Tensor = None
    cu_seqlens: torch.Tensor = None  # packed
    seqused_k: torch.Tensor = None  # a cache's keys before the call
    page_table: torch.Tensor = None
    k_new: torch.Tensor = None  # what is appended
    v_new: torch.Tensor = None
    cos: torch.Tensor = None
    sin: torch.Tensor = None


class Draw:
    def __init__(self, case, device, seed):
        self.options = dict(dtype=DTYPES[case.dtype], device=device)
        self.generator = torch.Generator(device).manual_seed(seed)

    def __call__(self, *shape):
        return torch.empty(shape, **self.options).normal_(generator=self.generator)


def rotation(rows, head_dim, dtype, device):
    """cos and sin [rows, head_dim / 2] of the usual rotary embedding."""
    steps = torch.arange(head_dim // 2, device=device, dtype=torch.float64)
    angles = torch.arange(rows, device=device, dtype=torch.float64)[:, None] * 1e4 ** (-2 * steps / head_dim)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def out_of_pages(x, pages):
    """[..., keys, heads, dim] of the pages [..., columns] of a cache x [num_pages, page_size, heads, dim]."""
    return x[pages.long()].flatten(-4, -3)


def make_inputs(task, device, seed=0):
    case = task.case
    draw = Draw(case, device, seed)
    q_shape, k_shape, v_shape = (
        (case.heads, case.head_dim), (case.heads_k, case.head_dim), (case.heads_v, case.head_dim_v),
    )  # fmt: skip
    o_shape = (case.heads, case.head_dim_v)
    if case.layout == "packed":
        assert case.seqlens_q == case.seqlens_k, "one list of lengths"
        total = sum(case.seqlens_q)
        ends = [0, *itertools.accumulate(case.seqlens_q)]
        return Inputs(
            draw(total, *q_shape), draw(total, *k_shape), draw(total, *v_shape), draw(total, *o_shape),
            cu_seqlens=torch.tensor(ends, dtype=torch.int32, device=device),
        )  # fmt: skip
    batch, (seqlen_q, *_), (seqlen_k, *_) = case.batch, case.seqlens_q, case.seqlens_k
    assert len({*case.seqlens_q}) == len({*case.seqlens_k}) == 1, "sequences of several lengths are packed"
    if case.layout == "dense":
        lead, table = (batch, seqlen_k), None
    else:
        columns = -(-seqlen_k // case.page_size)
        lead = (batch * columns, case.page_size)
        order = torch.randperm(lead[0], device=device, generator=draw.generator)
        table = order.to(torch.int32).view(batch, columns)
    inputs = Inputs(draw(batch, seqlen_q, *q_shape), draw(*lead, *k_shape), draw(*lead, *v_shape), page_table=table)
    if task.kind in ("forward", "backward"):
        inputs.dout = draw(batch, seqlen_q, *o_shape)
    if task.kind in ("decode", "append"):
        before = seqlen_k - (seqlen_q if task.kind == "append" else 0)
        inputs.seqused_k = torch.full((batch,), before, dtype=torch.int32, device=device)
    if task.kind == "append":
        inputs.k_new, inputs.v_new = draw(batch, seqlen_q, *k_shape), draw(batch, seqlen_q, *v_shape)
        inputs.cos, inputs.sin = rotation(seqlen_k, case.head_dim, DTYPES[case.dtype], device)
    return inputs
