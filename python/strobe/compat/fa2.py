"""The seven functions of flash_attn: Strobe's, that also understand SWAA's order and what FlashAttention 2 allows."""

import functools
import inspect

import torch
from torch import Tensor

import strobe
from strobe.compat.blocks import unnormalised
from strobe.compat.order import Order
from strobe.compat.tail import with_tail, without_tail

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]


def _drop_in(function, packed=False):
    order, signature = Order(function), inspect.signature(function)
    position = order.position

    @functools.wraps(function)
    def call(*args, **kwargs):
        if len(args) > position:
            args, kwargs = order.arranged(args, kwargs)
        try:
            result = function(*args, **kwargs)
        except ValueError:
            result = _retry(signature.bind(*args, **kwargs)) if packed else None
            if result is None:
                raise
        except NotImplementedError:
            result = padded(function, signature.bind(*args, **kwargs))
            if result is None:
                raise
        if type(result) is tuple and result[2].numel():
            return _rescaled(signature.bind(*args, **kwargs), result)
        return result

    return call


def padded(function, bound):
    """The call with head dims padded to multiples of 8, as FlashAttention pads them; None if they are that already."""
    call = bound.arguments
    given = [name for name in ("q", "k", "v", "kv", "qkv") if name in call]
    dims = [call[name].shape[-1] for name in given]
    if all(dim % 8 == 0 for dim in dims) or call.get("out") is not None:
        return None
    if call.get("softmax_scale") is None:
        call["softmax_scale"] = dims[0] ** -0.5
    call |= {name: torch.nn.functional.pad(call[name], (0, -dim % 8)) for name, dim in zip(given, dims, strict=True)}
    result = function(*bound.args, **bound.kwargs)
    if type(result) is tuple:
        return (result[0][..., : dims[-1]], *result[1:])
    return result[..., : dims[-1]]


def _retry(bound):
    arguments = with_tail(bound.arguments)
    if arguments is None:
        return None
    result = strobe.flash_attn_varlen_func(**arguments)
    if type(result) is tuple and result[2].numel():
        return (*result[:2], without_tail(result[2], bound.arguments))
    return result


def _rescaled(bound, result):
    """S_dmask in FlashAttention's scale."""
    q = next(iter(bound.arguments.values()))
    out, lse, probs = result
    return out, lse, unnormalised(probs, q.shape[-1], bool(bound.arguments.get("causal", False)))


def _cached(function):
    """The KV cache: no gradient, as FlashAttention's; Strobe's own refuses tensors that ask for one."""
    order, signature = Order(function), inspect.signature(function)
    position = order.position

    @functools.wraps(function)
    def call(*args, **kwargs):
        if len(args) > position:
            args, kwargs = order.arranged(args, kwargs)
        tensors = (*args[:5], *kwargs.values())
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in tensors):
            with torch.no_grad():
                return call(*args, **kwargs)
        try:
            return function(*args, **kwargs)
        except ValueError:
            bound = signature.bind(*args, **kwargs)
            if not _first_rows(bound.arguments):
                raise
            return function(*bound.args, **bound.kwargs)

    return call


def _first_rows(call: dict) -> bool:
    """Cuts caches of more rows than q has, whose first rows FlashAttention takes, in place."""
    if any(call.get(name) is not None for name in ("cache_batch_idx", "block_table", "page_table")):
        return False
    batch = call["q"].shape[0]
    if call["k_cache"].shape[0] <= batch:
        return False
    call["k_cache"], call["v_cache"] = call["k_cache"][:batch], call["v_cache"][:batch]
    return True


flash_attn_func = _drop_in(strobe.flash_attn_func)
flash_attn_kvpacked_func = _drop_in(strobe.flash_attn_kvpacked_func)
flash_attn_qkvpacked_func = _drop_in(strobe.flash_attn_qkvpacked_func)
flash_attn_varlen_func = _drop_in(strobe.flash_attn_varlen_func, packed=True)
flash_attn_varlen_kvpacked_func = _drop_in(strobe.flash_attn_varlen_kvpacked_func, packed=True)
flash_attn_varlen_qkvpacked_func = _drop_in(strobe.flash_attn_varlen_qkvpacked_func, packed=True)
flash_attn_with_kvcache = _cached(strobe.flash_attn_with_kvcache)
