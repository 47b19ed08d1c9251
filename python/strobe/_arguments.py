"""What the public functions share: from FlashAttention's arguments to `Side` and `Options`. The core checks values."""

import numbers

import torch
from torch import Tensor

from strobe._extension import Options


def last_contiguous(x):
    """x, or a copy (differentiable) where its last stride is not 1 or its memory holds -x."""
    if not isinstance(x, Tensor) or x.layout != torch.strided:
        return x
    if not torch.compiler.is_compiling() and x.is_neg():
        x = x.resolve_neg()
    return x.contiguous() if x.dim() > 0 and x.stride(-1) != 1 and x.shape[-1] != 1 else x


def autocast(*tensors):
    """Under torch.autocast, fp32 tensors in its dtype, as scaled_dot_product_attention takes them."""
    device = next((t.device.type for t in tensors if isinstance(t, Tensor)), "cpu")
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if isinstance(t, Tensor) and t.dtype == torch.float32 else t for t in tensors)


def sinks_of(s_aux):
    """s_aux in the dtype that its device's engine reads, differentiable."""
    return s_aux.float() if isinstance(s_aux, Tensor) and s_aux.is_cuda else s_aux


def one_of(function: str, **given):
    """The one argument given among aliases."""
    named = {name: value for name, value in given.items() if value is not None}
    if len(named) > 1:
        raise TypeError(f"{function}: {' and '.join(named)} are names of one argument, give only one of them")
    return next(iter(named.values()), None)


def whole(function: str, name: str, value) -> int:
    if isinstance(value, Tensor) and value.dim() == 0 and not value.is_floating_point():
        return int(value)
    if isinstance(value, (numbers.Integral, torch.SymInt)) and not isinstance(value, bool):
        return value
    raise TypeError(f"{function}: {name} is {value!r}, it takes an integer")


def real(function: str, name: str, value) -> float:
    if isinstance(value, (numbers.Real, torch.SymFloat)) and not isinstance(value, bool):
        return float(value)
    raise TypeError(f"{function}: {name} is {value!r}, it takes a number")


def lengths(function: str, name: str, value, batch: int, q):
    """An int32 [batch] tensor beside q from one, or from an int that holds for every sequence."""
    if value is None or (isinstance(value, Tensor) and value.dim() > 0):
        return value
    return torch.full((batch,), whole(function, name, value), dtype=torch.int32, device=getattr(q, "device", None))


def options(
    function: str, *, softmax_scale, causal, window_size, softcap, keep_first, force_fa_decode, backend,
    dropout_p=0.0, deterministic=False, max_seqlen_q=-1, max_seqlen_k=-1,
) -> Options:  # fmt: skip
    window = (-1, -1) if window_size is None else window_size
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise ValueError(f"{function}: window_size is {window_size!r}, it takes (left, right), -1 for unbounded")
    if backend is not None and not isinstance(backend, str):
        raise TypeError(f"{function}: backend is {backend!r}, it takes a name or None")
    return Options(
        function,
        whole(function, "max_seqlen_q", max_seqlen_q),
        whole(function, "max_seqlen_k", max_seqlen_k),
        None if softmax_scale is None else real(function, "softmax_scale", softmax_scale),
        real(function, "softcap", softcap),
        real(function, "dropout_p", dropout_p),
        bool(causal),
        (whole(function, "window_size", window[0]), whole(function, "window_size", window[1])),
        whole(function, "keep_first", keep_first),
        bool(force_fa_decode),
        bool(deterministic),
        backend,
    )
