"""FlashAttention's semi-private functions as torch custom ops, in FlashAttention's or in SWAA's order."""

import inspect
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.library import custom_op

from strobe.compat import raw
from strobe.compat.order import Order, swaa_order


class OrderedOp:
    """Mixed into the class of a custom op: a call in SWAA's order is understood."""

    def __call__(self, *args, **kwargs):
        if len(args) > self._order.position:
            args, kwargs = self._order.arranged(args, kwargs)
        return super().__call__(*args, **kwargs)


def define(namespace: str, swaa: bool = False) -> SimpleNamespace:
    """The four ops in a namespace of torch.ops; `swaa` puts keep_first and force_fa_decode after softcap."""
    ops = {}
    for function, mutated, fake in (
        (_flash_attn_forward, (), _fake_forward),
        (_flash_attn_varlen_forward, (), _fake_forward),
        (_flash_attn_backward, ("dq", "dk", "dv"), _fake_backward),
        (_flash_attn_varlen_backward, ("dq", "dk", "dv"), _fake_backward),
    ):
        name = function.__name__
        kernel = swaa_order(function) if swaa else function
        op = ops[name] = custom_op(f"{namespace}::{name}", kernel, mutates_args=mutated)
        op.register_fake(_fake_of(kernel, fake))
        if not swaa:
            op._order = Order(function)
            op.__class__ = type("OrderedOp", (OrderedOp, type(op)), {})
        ops[f"_wrapped{name}"] = getattr(getattr(torch.ops, namespace), name)
    return SimpleNamespace(**ops)


def in_swaa_order(defined: SimpleNamespace) -> SimpleNamespace:
    """Functions that take SWAA's positions and call the ops of `define`."""
    names = [name for name in vars(defined) if name.startswith("_flash")]
    return SimpleNamespace(**{n: swaa_order(getattr(defined, n), like=getattr(defined, n)._init_fn) for n in names})


def _flash_attn_forward(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int,
    window_size_right: int, softcap: float, alibi_slopes: Tensor | None, return_softmax: bool, *,
    keep_first: int = 0, force_fa_decode: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return raw.forward(
        "_flash_attn_forward", q, k, v, dropout_p=dropout_p, softmax_scale=softmax_scale, causal=causal,
        window=(window_size_left, window_size_right), softcap=softcap, alibi_slopes=alibi_slopes,
        return_softmax=return_softmax, keep_first=keep_first, force_fa_decode=force_fa_decode,
    )  # fmt: skip


def _flash_attn_varlen_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int = -1, window_size_right: int = -1,
    softcap: float = 0.0, alibi_slopes: Tensor | None = None, return_softmax: bool = False,
    block_table: Tensor | None = None, leftpad_k: Tensor | None = None, seqused_k: Tensor | None = None,
    zero_tensors: bool = False, num_splits: int = 0, *, keep_first: int = 0, force_fa_decode: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    # num_splits is a wish about speed: a forward call has the same bits every time anyway.
    return raw.forward(
        "_flash_attn_varlen_forward", q, k, v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k, dropout_p=dropout_p, softmax_scale=softmax_scale,
        causal=causal, window=(window_size_left, window_size_right), softcap=softcap, alibi_slopes=alibi_slopes,
        return_softmax=return_softmax, page_table=block_table, leftpad_k=leftpad_k, seqused_k=seqused_k,
        zero_tensors=zero_tensors, keep_first=keep_first, force_fa_decode=force_fa_decode,
    )  # fmt: skip


def _flash_attn_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, dq: Tensor | None,
    dk: Tensor | None, dv: Tensor | None, dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int,
    window_size_right: int, softcap: float, alibi_slopes: Tensor | None, deterministic: bool,
    rng_state: Tensor | None = None, *, keep_first: int = 0, force_fa_decode: bool = False,
) -> Tensor:  # fmt: skip
    return raw.backward(
        "_flash_attn_backward", dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p=dropout_p,
        softmax_scale=softmax_scale, causal=causal, window=(window_size_left, window_size_right), softcap=softcap,
        alibi_slopes=alibi_slopes, deterministic=deterministic, rng_state=rng_state, keep_first=keep_first,
        force_fa_decode=force_fa_decode,
    )[3]  # fmt: skip


def _flash_attn_varlen_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, dq: Tensor | None,
    dk: Tensor | None, dv: Tensor | None, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int,
    window_size_right: int, softcap: float, alibi_slopes: Tensor | None, deterministic: bool,
    rng_state: Tensor | None = None, zero_tensors: bool = False, *, keep_first: int = 0, force_fa_decode: bool = False,
) -> Tensor:  # fmt: skip
    # zero_tensors has nothing to do: every entry of the gradients is written.
    return raw.backward(
        "_flash_attn_varlen_backward", dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k, max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k, dropout_p=dropout_p,
        softmax_scale=softmax_scale, causal=causal, window=(window_size_left, window_size_right), softcap=softcap,
        alibi_slopes=alibi_slopes, deterministic=deterministic, rng_state=rng_state, keep_first=keep_first,
        force_fa_decode=force_fa_decode,
    )[3]  # fmt: skip


def _fake_of(function, fake):
    signature = inspect.signature(function)

    def call(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return fake(SimpleNamespace(**bound.arguments))

    return call


def _rounded(n):
    return (n + 127) // 128 * 128


def _fake_forward(call):
    q, v = call.q, call.v
    if q.dim() == 4:
        lse, batch, rows, cols = (q.shape[0], q.shape[2], q.shape[1]), q.shape[0], q.shape[1], call.k.shape[1]
    else:
        lse, batch = (q.shape[1], q.shape[0]), call.cu_seqlens_q.shape[0] - 1
        rows, cols = call.max_seqlen_q, call.max_seqlen_k
    probs = (batch, q.shape[-2], _rounded(rows), _rounded(cols)) if call.return_softmax else (0,)
    return (
        q.new_empty((*q.shape[:-1], v.shape[-1])),
        q.new_empty(lse, dtype=torch.float32),
        q.new_empty(probs),
        torch.empty(2, dtype=torch.int64, device="cpu"),
    )


def _fake_backward(call):
    if call.q.dim() == 4:
        batch, rows, heads, _ = call.q.shape
        return call.q.new_empty((batch, heads, _rounded(rows)), dtype=torch.float32)
    total, heads, _ = call.q.shape
    return call.q.new_empty((heads, total + 128 * (call.cu_seqlens_q.shape[0] - 1)), dtype=torch.float32)
