"""The C extension, bound to torch, and the two groups of values that a call of it takes beside q, k and v."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from strobe import _C


def _handle(path: str, otherwise):
    """What torch offers under a private name, or what serves in its place."""
    value = torch
    for name in path.split("."):
        value = getattr(value, name, None)
    return otherwise if value is None else value


def _empty_on(device: str):
    return lambda size, stride, dtype: torch.empty_strided(size, stride, dtype=dtype, device=device)


_C.bind(
    torch.Tensor,
    torch.nn.Parameter,
    {
        "dispatch_modes": _handle("_C._len_torch_dispatch_stack", lambda: 0),
        "functorch": _handle("_C._are_functorch_transforms_active", lambda: False),
        "tracing": _handle("_C._is_tracing", lambda: torch._C._get_tracing_state() is not None),
        "autocast": torch._C._is_any_autocast_enabled,
        "grad": torch.is_grad_enabled,
        "is_neg": torch.Tensor.is_neg,
        "contiguous": torch.Tensor.contiguous,
        # Inductor's own allocator takes a third of the time of torch.empty_strided.
        "empty_cpu": _handle("_C._dynamo.guards._empty_strided_cpu", _empty_on("cpu")),
        "empty_cuda": _handle("_C._dynamo.guards._empty_strided_cuda", _empty_on("cuda")),
        "float32": torch.float32,
        "float16": torch.float16,
        "bfloat16": torch.bfloat16,
        "uint8": torch.uint8,
        "forward_ad": forward_ad.__dict__,
    },
)
cpu_isa = _C.cpu_isa


class Side(NamedTuple):
    """Tensors beside q, k, v, s_aux and out, in the extension's order."""

    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    seqused_q: Tensor | None = None
    seqused_k: Tensor | None = None
    leftpad_k: Tensor | None = None
    page_table: Tensor | None = None
    cache_batch_idx: Tensor | None = None
    full_from: Tensor | None = None
    alibi_slopes: Tensor | None = None


class Options(NamedTuple):
    """Scalars of a call, in the extension's order. A backend of None is STROBE_BACKEND's, or the planner's choice."""

    function: str
    max_seqlen_q: int = -1
    max_seqlen_k: int = -1
    softmax_scale: float | None = None
    softcap: float = 0.0
    dropout_p: float = 0.0
    causal: bool = False
    window_size: tuple[int, int] | None = (-1, -1)
    keep_first: int = 0
    force_fa_decode: bool = False
    deterministic: bool = False
    backend: str | None = None
    seed: int = 0
    offset: int = 0

    def seeded(self, rng_state: Tensor | None) -> "Options":
        if rng_state is None:
            return self
        seed, offset = rng_state.tolist()
        return self._replace(seed=seed, offset=offset)


def run_forward(q, k, v, s_aux, side: Side, options: Options, out=None) -> tuple[Tensor, Tensor]:
    """(out, lse)."""
    return _C.forward((q, k, v, s_aux, out, *side, *options))


def run_backward(dout, dlse, q, k, v, out, lse, s_aux, side: Side, options: Options):
    """(dq, dk, dv, ds_aux), ds_aux None without s_aux."""
    if dout is None:
        dout = torch.zeros_like(out)
    if torch.are_deterministic_algorithms_enabled():
        options = options._replace(deterministic=True)
    dq, dk, dv, ds_aux = _C.backward((q, k, v, s_aux, out, *side, lse), options, dout, dlse)
    return dq, dk, dv, None if ds_aux is None else ds_aux.to(s_aux.dtype)


def is_traced(*tensors) -> bool:
    """True where a call must go through an operator: a dispatch mode, a subclass, jit tracing, functionalization."""
    if torch._C._len_torch_dispatch_stack() > 0 or torch._C._get_tracing_state() is not None:
        return True
    for t in tensors:
        if isinstance(t, Tensor) and type(t) not in (Tensor, torch.nn.Parameter):
            return True
        if t is not None and torch._C._functorch.is_legacy_batchedtensor(t):  # is_grads_batched=True
            return True
    if not torch._C._are_functorch_transforms_active():
        return False
    return torch._C._functorch.peek_interpreter_stack().key() == torch._C._functorch.TransformType.Functionalize
