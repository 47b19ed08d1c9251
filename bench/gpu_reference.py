"""Attention in float64 for some heads of some sequences, and the check that a result must pass before it is timed."""

import random
from dataclasses import dataclass

import torch

from bench.cases import bounds
from bench.gpu_inputs import out_of_pages

ELEMENTS = 1 << 25  # scores held at once


@dataclass
class Part:
    """One sequence and one head of k and v, with the query heads that share it."""

    b: int
    head: int


def parts_of(task):
    """A random head of a random sequence; of packed sequences also the longest and the shortest."""
    case, rng = task.case, random.Random(task.name)
    chosen = [rng.randrange(case.batch)]
    if case.layout == "packed":
        lengths = case.seqlens_q
        chosen += [lengths.index(max(lengths)), lengths.index(min(lengths))]
    return [Part(b, rng.randrange(case.heads_k)) for b in dict.fromkeys(chosen)]


def rows_of(x, inputs, b):
    return x[b] if inputs.cu_seqlens is None else x[inputs.cu_seqlens[b] : inputs.cu_seqlens[b + 1]]


def query_heads(case, part):
    group = case.heads // case.heads_k
    return slice(part.head * group, (part.head + 1) * group)


def keys_of(x, inputs, b):
    """[keys, heads, dim] of a sequence, out of its pages if it has any."""
    if inputs.page_table is None:
        return rows_of(x, inputs, b)
    return out_of_pages(x, inputs.page_table[b])


def rotate(x, cos, sin):
    """Halves turned by their position; x [rows, ..., dim], cos and sin [rows, dim / 2]."""
    cos, sin = (y.double().view(len(y), *[1] * (x.ndim - 2), -1) for y in (cos, sin))
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)


def visible_rows(case, seqlen_q, seqlen_k, start, stop, device):
    """The mask of query rows [start, stop)."""
    low, high = (torch.from_numpy(x[start:stop]).to(device)[:, None] for x in bounds(case, seqlen_q, seqlen_k))
    keys = torch.arange(seqlen_k, device=device)[None]
    return (keys < high) & ((keys >= low) | (keys < case.keep_first))


def reference(task, inputs, part):
    """(out,) or (dq, dk, dv) of the part: out [seqlen_q, group, head_dim_v], dk [seqlen_k, head_dim], ..."""
    case, b = task.case, part.b
    assert case.heads_k == case.heads_v, "one head of k belongs to one of v"
    heads = query_heads(case, part)
    seqlen_q, seqlen_k = case.seqlens_q[b], case.seqlens_k[b]
    q = rows_of(inputs.q, inputs, b)[:, heads].double()
    k, v = (keys_of(x, inputs, b)[:seqlen_k, part.head].double() for x in (inputs.k, inputs.v))
    if task.kind == "append":
        old = seqlen_k - seqlen_q
        cos, sin = inputs.cos[old:seqlen_k], inputs.sin[old:seqlen_k]
        q = rotate(q, cos, sin)
        k = torch.cat([k[:old], rotate(inputs.k_new[b, :, part.head].double(), cos, sin)])
        v = torch.cat([v[:old], inputs.v_new[b, :, part.head].double()])
    scale = case.head_dim**-0.5
    out = q.new_empty(*q.shape[:2], v.shape[1])
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    step = max(1, ELEMENTS // (seqlen_k * q.shape[1]))
    for start in range(0, seqlen_q, step):
        rows = slice(start, min(start + step, seqlen_q))
        mask = visible_rows(case, seqlen_q, seqlen_k, rows.start, rows.stop, q.device)
        score = torch.einsum("ihd,jd->hij", q[rows], k).mul_(scale).masked_fill_(~mask, float("-inf"))
        probs = score.softmax(-1)
        out[rows] = torch.einsum("hij,jd->ihd", probs, v)
        if task.kind == "backward":
            dout = rows_of(inputs.dout, inputs, b)[rows, heads].double()
            delta = (dout * out[rows]).sum(-1).T[..., None]
            dv += torch.einsum("hij,ihd->jd", probs, dout)
            dscore = torch.einsum("ihd,jd->hij", dout, v).sub_(delta).mul_(probs).mul_(scale)
            dq[rows] = torch.einsum("hij,jd->ihd", dscore, k)
            dk += torch.einsum("hij,ihd->jd", dscore, q[rows])
    return (dq, dk, dv) if task.kind == "backward" else (out,)


def part_of(task, inputs, part, results):
    """The same part of a system's results: they begin with what has query heads, the others have key heads."""
    heads = (query_heads(task.case, part), part.head, part.head)
    return [rows_of(x, inputs, part.b)[:, head] for x, head in zip(results, heads[: len(results)], strict=True)]


TOLERANCE = {"fp32": 1e-3, "fp16": 5e-3, "bf16": 1e-2}  # relative error of a result; twice that of a gradient


def difference(actual, expected):
    expected = expected.double()
    return ((actual.double() - expected).norm() / expected.norm()).item()


class Judge:
    """Refuses wrong results. Every system is compared with float64 where that was computed, and in full with the first
    system that passed."""

    def __init__(self, task, inputs):
        self.task, self.inputs = task, inputs
        self.expected = [(part, reference(task, inputs, part)) for part in parts_of(task)]
        self.tolerance = TOLERANCE[task.case.dtype] * (2 if task.kind == "backward" else 1)
        self.names = ("dq", "dk", "dv") if task.kind == "backward" else ("out",)
        self.witness, self.witness_name = None, None

    def compare(self, results, expected, where):
        for name, actual, wanted in zip(self.names, results, expected, strict=True):
            if actual.shape != wanted.shape:
                raise RuntimeError(f"{name} has shape {list(actual.shape)}, not {list(wanted.shape)}")
            error = difference(actual, wanted)
            if not error <= self.tolerance:  # NaN fails
                raise RuntimeError(f"{name} differs from {where} by {error:.2g}, allowed {self.tolerance:g}")

    def check(self, system, results):
        for part, expected in self.expected:
            where = f"float64 (sequence {part.b}, head {part.head})"
            self.compare(part_of(self.task, self.inputs, part, results), expected, where)
        if self.witness is None:
            self.witness, self.witness_name = [x.detach().clone() for x in results], system
        else:
            self.compare(results, self.witness, f"{self.witness_name}'s")
