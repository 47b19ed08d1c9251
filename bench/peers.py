"""The systems on a CPU. Each prepares a task: everything but the call is done before the clock runs.

A system is a function (task, inputs) -> Prepared, or None where it cannot do the task. Each gets the layout that it
likes best: Strobe [batch, seqlen, heads, head_dim], PyTorch contiguous [batch, heads, seqlen, head_dim].
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention

import strobe as strobe_package
from bench.cases import dense_mask


@dataclass
class Prepared:
    call: Callable  # what is timed
    results: Callable = tuple  # of what a call returned: tensors [batch, seqlen, heads, dim], to compare systems


def prepared(kind, attend, tensors, dout, results):
    """The same for every system: `attend(q, k, v)`, its gradient call alone (the graph is kept), or both."""
    if kind in ("forward", "decode", "append", "host"):
        q, k, v = tensors
        return Prepared(lambda: attend(q, k, v), results)
    q, k, v = leaves = [x.detach().requires_grad_() for x in tensors]
    if kind == "host_grad":
        return Prepared(lambda: attend(q, k, v), lambda out: results(out.detach()))
    if kind == "backward":
        out = attend(q, k, v)
        return Prepared(lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True), lambda all: results(*all))
    if kind == "memory":

        def both():
            out = attend(q, k, v)
            return out, *torch.autograd.grad(out, leaves, dout)

        return Prepared(both, lambda all: results(*all))
    raise ValueError(kind)


def strobe(task, inputs):
    case = task.case
    options = dict(causal=case.causal, window_size=case.window, keep_first=case.keep_first)
    q, k, v = inputs.q, inputs.k, inputs.v
    if task.kind == "decode":
        lengths = torch.tensor(case.seqlens_k, dtype=torch.int32)
        options |= dict(cache_seqlens=lengths, page_table=inputs.page_table)
        q = q.view(case.batch, case.seqlens_q[0], case.heads, case.head_dim)

        def attend(q, k, v):
            return strobe_package.flash_attn_with_kvcache(q, k, v, **options)
    elif task.kind in ("host", "host_grad"):
        attend = strobe_package.flash_attn_func
    else:

        def attend(q, k, v):
            return strobe_package.flash_attn_func(q, k, v, **options)

    return prepared(task.kind, attend, (q, k, v), inputs.dout, lambda *x: x)


def sdpa(task, inputs):
    case = task.case
    if case.page_size:
        return None  # it reads no pages
    tensors = [x.transpose(1, 2).contiguous() for x in (inputs.q, inputs.k, inputs.v)]
    dout = inputs.dout.transpose(1, 2).contiguous()
    options = {}
    if case.window != (-1, -1):
        options = dict(attn_mask=dense_mask(case))
    elif case.causal and case.seqlens_q[0] > 1:
        assert case.seqlens_q == case.seqlens_k, "is_causal aligns other lengths differently"
        options = dict(is_causal=True)
    if case.heads_k != case.heads:
        options |= dict(enable_gqa=True)
    if task.kind in ("host", "host_grad"):
        attend = scaled_dot_product_attention
    else:

        def attend(q, k, v):
            return scaled_dot_product_attention(q, k, v, **options)

    return prepared(task.kind, attend, tensors, dout, lambda *x: tuple(y.transpose(1, 2) for y in x))


def drop_in(task, inputs):
    """The distribution flash-attn of compat/: what its front adds to Strobe's own."""
    folder = str(Path(__file__).resolve().parents[1] / "compat" / "flash-attn")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    from flash_attn import flash_attn_func

    return prepared(task.kind, flash_attn_func, (inputs.q, inputs.k, inputs.v), inputs.dout, lambda *x: x)


SYSTEMS = {"strobe": strobe, "drop-in": drop_in, "sdpa": sdpa}
KINDS = {"drop-in": ("host", "host_grad")}  # of tasks that a system is for; others are for all


def systems_for(task):
    return {name: system for name, system in SYSTEMS.items() if task.kind in KINDS.get(name, (task.kind,))}


TOLERANCE = {"fp32": 1e-3, "bf16": 3e-2, "fp16": 1e-2}


def check_agreement(task, results):
    """A timing counts only if the systems computed the same thing."""
    reference = results["strobe"]
    for name, others in results.items():
        for ours, theirs in zip(reference, others, strict=True):
            ours, theirs = ours.float(), theirs.float()
            error = ((ours - theirs).norm() / theirs.norm()).item()
            if not error <= TOLERANCE[task.case.dtype]:
                raise RuntimeError(f"{task.suite}, {task.name}: strobe and {name} differ by {error:.2g}")
