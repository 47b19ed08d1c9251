"""FlexHeadFA's Hopper module: the forward pass on one engine, the backward pass on another."""

import torch

from strobe._arguments import last_contiguous, options
from strobe._extension import Side, run_backward, run_forward
from strobe.compat.arguments import lse_of_fa3, no_float8


class TwoEngines(torch.autograd.Function):
    """(out, lse): every engine writes and reads the same out and LSE, so any two of them go together."""

    @staticmethod
    def forward(ctx, q, k, v, side, call, backward_backend):
        out, lse = run_forward(q, k, v, None, side, call)
        ctx.save_for_backward(q, k, v, out, lse, *side)
        ctx.call = call._replace(backend=backward_backend)
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        q, k, v, out, lse, *side = ctx.saved_tensors
        gradients = run_backward(dout.contiguous(), dlse, q, k, v, out, lse, None, Side(*side), ctx.call)
        return *gradients[:3], None, None, None


def _apply(function, q, k, v, side, backward_backend, **values):
    no_float8(function, q=q, k=k, v=v)
    call = options(function, window_size=(-1, -1), softcap=0.0, keep_first=0, force_fa_decode=False, **values)
    q, k, v = map(last_contiguous, (q, k, v))
    out, lse = TwoEngines.apply(q, k, v, side, call, backward_backend)
    return out, lse_of_fa3(lse)


def flash_attn_f3b2_func(
    q, k, v, softmax_scale=None, causal=False, deterministic=False, *, forward_backend=None, backward_backend=None
):  # fmt: skip
    """out [batch, seqlen_q, heads, head_dim_v]. Engines that are None are the planner's choice."""
    return _apply(
        "flash_attn_f3b2_func", q, k, v, Side(), backward_backend, softmax_scale=softmax_scale, causal=causal,
        deterministic=deterministic, backend=forward_backend,
    )[0]  # fmt: skip


def flash_attn_f3b2_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False,
    deterministic=False, *, forward_backend=None, backward_backend=None,
):  # fmt: skip
    """(out [total_q, heads, head_dim_v], lse [heads, total_q])."""
    return _apply(
        "flash_attn_f3b2_varlen_func", q, k, v, Side(cu_seqlens_q, cu_seqlens_k), backward_backend,
        softmax_scale=softmax_scale, causal=causal, deterministic=deterministic, backend=forward_backend,
        max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k,
    )  # fmt: skip
