"""Gradients of eager calls: a function of plain tensors that the extension records, and one for functorch."""

import torch

from strobe import _C
from strobe._extension import Options, Side, is_traced, run_backward, run_forward


def _gradients(dout, dlse, q, k, v, s_aux, out, lse, side, options):
    if torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
        return AttentionBackward.apply(dout, dlse, q, k, v, out, lse, s_aux, side, options)
    if is_traced(dout, dlse, q, k, v):
        from strobe._operators import backward_operator

        return backward_operator(dout, dlse, q, k, v, out, lse, s_aux, side, options)
    return run_backward(dout, dlse, q, k, v, out, lse, s_aux, side, options)


class Recorded(torch.autograd.Function):
    """What `_C.attend` applies to q, k, v and s_aux: out, or (out, lse) where it is wanted.

    Its forward is the extension's `record`, which saves (q, k, v, s_aux, lse, out), then the tensors of the side if
    there are any, and ctx.options.
    """

    forward = staticmethod(_C.record)

    @staticmethod
    def backward(ctx, dout, dlse=None):
        q, k, v, s_aux, lse, out, *side = ctx.saved_tensors
        return _gradients(dout, dlse, q, k, v, s_aux, out, lse, Side(*side), Options(*ctx.options))


# Past the Python part of Function.apply, which serves setup_context and functorch.
_C.bind_apply(super(torch.autograd.Function, Recorded).apply)


class Attention(torch.autograd.Function):
    """apply(q, k, v, s_aux, side, options) -> (out, lse), both differentiable once; vmap and func.grad too."""

    @staticmethod
    def forward(q, k, v, s_aux, side, options):
        return run_forward(q, k, v, s_aux, side, options)

    @staticmethod
    def setup_context(ctx, inputs, output):
        q, k, v, s_aux, side, options = inputs
        ctx.save_for_backward(q, k, v, s_aux, *output, *side)
        ctx.options = options

    @staticmethod
    def backward(ctx, dout, dlse):
        q, k, v, s_aux, out, lse, *side = ctx.saved_tensors
        return *_gradients(dout, dlse, q, k, v, s_aux, out, lse, Side(*side), ctx.options), None, None

    @staticmethod
    def vmap(info, in_dims, q, k, v, s_aux, side, options):
        return mapped(Attention.apply, info, in_dims, (q, k, v, s_aux), (side, options))


class AttentionBackward(torch.autograd.Function):
    """The gradients as a function of their own, so that vmap of a gradient is served and a second gradient refused."""

    @staticmethod
    def forward(dout, dlse, q, k, v, out, lse, s_aux, side, options):
        return run_backward(dout, dlse, q, k, v, out, lse, s_aux, side, options)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.function = inputs[-1].function

    @staticmethod
    def backward(ctx, *gradients):
        raise RuntimeError(f"{ctx.function}: second derivatives are not implemented")

    @staticmethod
    def vmap(info, in_dims, *inputs):
        return mapped(AttentionBackward.apply, info, in_dims, inputs[:-2], inputs[-2:])


def mapped(function, info, in_dims, tensors, rest):
    """One call per mapped entry."""
    results = []
    for n in range(info.batch_size):
        entry = [t if d is None or t is None else t.select(d, n) for t, d in zip(tensors, in_dims, strict=False)]
        results.append(function(*entry, *rest))
    stacked = tuple(None if column[0] is None else torch.stack(column) for column in zip(*results, strict=True))
    return stacked, tuple(None if s is None else 0 for s in stacked)
