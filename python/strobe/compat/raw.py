"""Attention on plain tensors without autograd, forward and backward apart: what FlashAttention's private calls are."""

import torch
from torch import Tensor

from strobe._arguments import last_contiguous, options
from strobe._attend import _s_dmask
from strobe._extension import Side, run_backward, run_forward
from strobe.compat.arguments import INF, lse_of_fa2
from strobe.compat.blocks import unnormalised
from strobe.compat.tail import with_tail, without_tail

# (q, k, v, out) and the lengths of one call, by the names of flash_attn_varlen_func.
_SIDE = ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "leftpad_k", "page_table")


def forward(
    function: str, q, k, v, *, dropout_p, softmax_scale, causal, window, softcap, alibi_slopes, return_softmax=False,
    keep_first=0, force_fa_decode=False, out=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None,
    seqused_k=None, leftpad_k=None, page_table=None, max_seqlen_q=-1, max_seqlen_k=-1, zero_tensors=False,
    backend=None,
):  # fmt: skip
    """(out, lse, S_dmask, rng_state)."""
    if return_softmax and dropout_p == 0:
        raise ValueError(f"{function}: return_softmax is True, allowed is True only with dropout_p > 0")
    if page_table is not None and seqused_k is not None:
        cu_seqlens_k = None  # callers pass anything there
    ends = cu_seqlens_q
    call = dict(
        q=q, k=k, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, seqused_q=seqused_q, seqused_k=seqused_k,
        leftpad_k=leftpad_k, page_table=page_table, max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k,
        alibi_slopes=alibi_slopes,
    )  # fmt: skip
    longer = None if cu_seqlens_q is None else with_tail(call)
    given, call = call, longer or call
    scalars = options(
        function, softmax_scale=softmax_scale, causal=causal, window_size=window, softcap=softcap,
        keep_first=keep_first, force_fa_decode=force_fa_decode, backend=backend, dropout_p=dropout_p,
        max_seqlen_q=call["max_seqlen_q"], max_seqlen_k=call["max_seqlen_k"],
    )  # fmt: skip
    drop = dropout_p > 0
    rng_state = torch.randint(2**62, (2,), device="cpu") if drop else torch.zeros(2, dtype=torch.int64, device="cpu")
    scalars = scalars.seeded(rng_state if drop else None)
    q, k, v = map(last_contiguous, (q, k, v))
    side = Side(**{name: call[name] for name in _SIDE}, alibi_slopes=call["alibi_slopes"])
    out, lse = run_forward(q, k, v, None, side, scalars, out)
    if zero_tensors and ends is not None:
        lse = lse.masked_fill(torch.arange(lse.shape[1], device=lse.device) >= ends[-1], -INF)
    probs = q.new_empty(0)
    if return_softmax:
        probs = _s_dmask(q, k, v, out, lse, None, side, scalars)
        probs = unnormalised(probs if longer is None else without_tail(probs, given), q.shape[-1], causal)
    return out, lse, probs, rng_state


def backward(
    function: str, dout, q, k, v, out, lse, dq, dk, dv, *, dropout_p, softmax_scale, causal, window, softcap,
    alibi_slopes, deterministic, keep_first=0, force_fa_decode=False, rng_state=None, cu_seqlens_q=None,
    cu_seqlens_k=None, seqused_q=None, seqused_k=None, max_seqlen_q=-1, max_seqlen_k=-1, backend=None,
):  # fmt: skip
    """(dq, dk, dv, softmax_d); gradients are written where buffers are given."""
    if dropout_p > 0 and rng_state is None:
        raise ValueError(f"{function}: rng_state is None, with dropout_p > 0 it takes the forward call's")
    call = dict(
        q=q, k=k, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, seqused_q=seqused_q, seqused_k=seqused_k,
        max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k, alibi_slopes=alibi_slopes, leftpad_k=None,
        page_table=None,
    )  # fmt: skip
    if cu_seqlens_q is not None:
        call = with_tail(call) or call
    scalars = options(
        function, softmax_scale=softmax_scale, causal=causal, window_size=window, softcap=softcap,
        keep_first=keep_first, force_fa_decode=force_fa_decode, backend=backend, dropout_p=dropout_p,
        deterministic=deterministic, max_seqlen_q=call["max_seqlen_q"], max_seqlen_k=call["max_seqlen_k"],
    ).seeded(rng_state if dropout_p > 0 else None)  # fmt: skip
    q, k, v, out, dout = map(last_contiguous, (q, k, v, out, dout))
    side = Side(**{name: call[name] for name in _SIDE}, alibi_slopes=call["alibi_slopes"])
    results = run_backward(dout, None, q, k, v, out, lse_of_fa2(lse).contiguous(), None, side, scalars)[:3]
    given = [r if g is None else g.copy_(r) for g, r in zip((dq, dk, dv), results, strict=True)]
    return *given, softmax_d(dout, out, cu_seqlens_q)


def softmax_d(dout: Tensor, out: Tensor, cu_seqlens_q=None) -> Tensor:
    """rowsum(dout * out) in float32: [batch, num_heads, rows rounded up to 128]; packed [num_heads, total_q + 128 *
    batch], where 128 entries lie between two sequences."""
    delta = (dout.float() * out.float()).sum(-1).transpose(-1, -2)
    if cu_seqlens_q is None:
        return torch.nn.functional.pad(delta, (0, -delta.shape[-1] % 128))
    rows = torch.arange(delta.shape[-1], device=delta.device, dtype=cu_seqlens_q.dtype)
    sequence = torch.searchsorted(cu_seqlens_q[1:].contiguous(), rows, right=True)
    batch = cu_seqlens_q.shape[0] - 1
    spread = delta.new_zeros(delta.shape[0], delta.shape[-1] + 128 * batch)
    return spread.index_copy_(1, rows + 128 * sequence.clamp(max=batch), delta)
