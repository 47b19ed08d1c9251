"""One call of attention: the extension where tensors are plain, else the route that fits what torch is doing."""

import torch
from torch import Tensor
from torch.autograd import forward_ad

from strobe import _C
from strobe._autograd import Attention
from strobe._extension import Options, Side, is_traced, run_forward
from strobe._operators import forward_operator, kvcache_operator
from strobe._sharding import distributed


def attend(q, k, v, s_aux, side: Side, options: Options, out=None, return_attn_probs=False):
    """out, or (out, lse, S_dmask), by any route. The extension checks values."""
    drop = options.dropout_p > 0
    if torch.compiler.is_compiling() or is_traced(q, k, v, s_aux):
        if out is not None or (return_attn_probs and drop):
            raise NotImplementedError(
                f"{options.function}: out= and return_attn_probs with dropout are for eager calls of plain tensors"
            )
        if not torch.compiler.is_compiling():
            s_aux, side = distributed(options.function, q, k, v, s_aux, side, options.dropout_p)
        rng_state = torch.randint(0, 2**62, (2,), device="cpu") if drop else None
        out, lse = forward_operator(q, k, v, s_aux, side, options, rng_state)
        return (out, lse, q.new_empty(0)) if return_attn_probs else out
    refuse_forward_mode(options.function, q, k, v, s_aux)
    if drop:
        options = options.seeded(torch.randint(0, 2**62, (2,), device="cpu"))
    functorch = torch._C._are_functorch_transforms_active()
    grad = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in (q, k, v, s_aux))
    if functorch or grad:
        if out is not None:
            raise ValueError(
                f"{options.function}: out is given with inputs that require a gradient, which out cannot carry"
            )
        out, lse = Attention.apply(q, k, v, s_aux, side, options)
    else:
        out, lse = run_forward(q, k, v, s_aux, side, options, out)
    if not return_attn_probs:
        return out
    return out, lse, _s_dmask(q, k, v, out, lse, s_aux, side, options) if drop else q.new_empty(0)


def attend_with_cache(q, k_cache, v_cache, s_aux, side: Side, options: Options, extra, rotary_interleaved, out=None):
    """(out, lse), by any route; the caches are written in place."""
    if torch.compiler.is_compiling() or is_traced(q, k_cache, v_cache, s_aux, *extra):
        if out is not None:
            raise NotImplementedError(f"{options.function}: out= is for eager calls of plain tensors")
        return kvcache_operator(q, k_cache, v_cache, s_aux, side, options, extra, rotary_interleaved)
    refuse_forward_mode(options.function, q, k_cache, v_cache, *extra)
    if torch._C._are_functorch_transforms_active():
        raise NotImplementedError(f"{options.function}: torch.func transforms of a call that writes a cache")
    return _C.kvcache((q, k_cache, v_cache, s_aux, out, *side, *options), extra, rotary_interleaved)


def refuse_forward_mode(function: str, *tensors):
    if forward_ad._current_level < 0:
        return
    for x in tensors:
        if isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None:
            raise NotImplementedError(f"{function}: forward-mode derivatives are not implemented")


def _s_dmask(q, k, v, out, lse, s_aux, side: Side, options: Options) -> Tensor:
    """[batch, num_heads, rows, cols] probabilities, negative where dropped; rows and cols are rounded up to 128."""
    paged = side.page_table is not None
    capacity = side.page_table.shape[1] * k.shape[1] if paged else k.shape[1]
    packed = side.cu_seqlens_q is not None
    rows = options.max_seqlen_q if packed else q.shape[1]
    cols = options.max_seqlen_k if packed else capacity
    batch = side.cu_seqlens_q.shape[0] - 1 if packed else q.shape[0]
    s_dmask = torch.empty(batch, q.shape[-2], -(-rows // 128) * 128, -(-cols // 128) * 128, dtype=q.dtype, device="cpu")
    # Only tests ask for this: it is computed where every engine's bits are known.
    tensors = tuple(t.detach().cpu() if isinstance(t, Tensor) else t for t in (q, k, v, s_aux, out, *side, lse))
    _C.probabilities(tensors, options._replace(backend=None), s_dmask)
    return s_dmask.to(q.device)
