"""From tensors to the engine: the autograd function of eager calls, and the operators that tracing sees.

Both call the same extension. The tensors of a call beside q, k, v travel as `Side`, its scalars as `Options`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from strobe import _C

_C.bind(torch.Tensor)
cpu_isa = _C.cpu_isa


class Side(NamedTuple):
    """Tensors beside q, k, v, out and lse, in the extension's order."""

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
    """Scalars of a call, in the extension's order."""

    function: str
    max_seqlen_q: int = -1
    max_seqlen_k: int = -1
    softmax_scale: float | None = None
    softcap: float = 0.0
    dropout_p: float = 0.0
    seed: int = 0
    offset: int = 0
    causal: bool = False
    window_left: int = -1
    window_right: int = -1
    keep_first: int = 0
    force_fa_decode: bool = False
    deterministic: bool = False
    backend: str | None = None


def _seeded(options: Options, rng_state: Tensor | None) -> Options:
    if rng_state is None:
        return options
    seed, offset = rng_state.tolist()
    return options._replace(seed=seed, offset=offset)


def run_forward(q, k, v, s_aux, side: Side, options: Options, out=None) -> tuple[Tensor, Tensor]:
    out_shape, lse_shape = _C.forward((q, k, v, out, None, *side, s_aux), options, False)
    if out is None:
        out = torch.empty(out_shape, dtype=q.dtype)
    lse = torch.empty(lse_shape, dtype=torch.float32)
    _C.forward((q, k, v, out, lse, *side, s_aux), options, True)
    return out, lse


def run_backward(dout, dlse, q, k, v, out, lse, s_aux, side: Side, options: Options):
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v))
    ds_aux = None if s_aux is None else torch.empty(s_aux.shape, dtype=torch.float32)
    dout = dout if dout.stride(-1) == 1 or dout.shape[-1] == 1 else dout.contiguous()
    dlse = None if dlse is None else dlse.contiguous()
    _C.backward((q, k, v, out, lse, *side, s_aux), options, (dout, dlse, dq, dk, dv, ds_aux))
    return dq, dk, dv, None if ds_aux is None else ds_aux.to(s_aux.dtype)


class Attention(torch.autograd.Function):
    """apply(q, k, v, s_aux, side, options) -> (out, lse), both differentiable once."""

    @staticmethod
    def forward(q, k, v, s_aux, side, options):
        return run_forward(q, k, v, s_aux, side, options)

    @staticmethod
    def setup_context(ctx, inputs, output):
        q, k, v, s_aux, side, options = inputs
        ctx.save_for_backward(q, k, v, s_aux, *output)
        ctx.side, ctx.options = side, options

    @staticmethod
    def backward(ctx, dout, dlse):
        q, k, v, s_aux, out, lse = ctx.saved_tensors
        gradients = AttentionBackward.apply(dout, dlse, q, k, v, out, lse, s_aux, ctx.side, ctx.options)
        return *gradients, None, None

    @staticmethod
    def vmap(info, in_dims, q, k, v, s_aux, side, options):
        return _mapped(Attention, info, in_dims, (q, k, v, s_aux), (side, options))


class AttentionBackward(torch.autograd.Function):
    """The gradients as a function of their own, so that vmap of a gradient is served and a second gradient refused."""

    @staticmethod
    def forward(dout, dlse, q, k, v, out, lse, s_aux, side, options):
        dq, dk, dv, ds_aux = run_backward(dout, dlse, q, k, v, out, lse, s_aux, side, options)
        return dq, dk, dv, ds_aux

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.function = inputs[-1].function

    @staticmethod
    def backward(ctx, *gradients):
        raise RuntimeError(f"{ctx.function}: second derivatives are not implemented")

    @staticmethod
    def vmap(info, in_dims, *inputs):
        return _mapped(AttentionBackward, info, in_dims, inputs[:-2], inputs[-2:])


def _mapped(function, info, in_dims, tensors, rest):
    """One call per mapped entry."""
    results = []
    for n in range(info.batch_size):
        entry = [t if d is None or t is None else t.select(d, n) for t, d in zip(tensors, in_dims, strict=False)]
        results.append(function.apply(*entry, *rest))
    stacked = tuple(None if column[0] is None else torch.stack(column) for column in zip(*results, strict=True))
    return stacked, tuple(None if s is None else 0 for s in stacked)


_SIDE_SCHEMA = ", ".join(f"Tensor? {name}" for name in Side._fields)
_OPTION_SCHEMA = (
    "Tensor? rng_state, str function, SymInt max_seqlen_q, SymInt max_seqlen_k, float? softmax_scale, float softcap, "
    "float dropout_p, bool causal, int window_left, int window_right, int keep_first, bool force_fa_decode, "
    "bool deterministic, str? backend"
)
_library = torch.library.Library("strobe", "DEF")
_library.define(
    f"fwd(Tensor q, Tensor k, Tensor v, Tensor? s_aux, {_SIDE_SCHEMA}, {_OPTION_SCHEMA}) -> (Tensor, Tensor)"
)
_library.define(
    "bwd(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? s_aux, "
    f"{_SIDE_SCHEMA}, {_OPTION_SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor)"
)
_SIDE = len(Side._fields)


def _unpack(rest) -> tuple[Side, Options]:
    rng_state, function, max_q, max_k, scale, softcap, dropout_p, *others = rest[_SIDE:]
    options = Options(function, max_q, max_k, scale, softcap, dropout_p, 0, 0, *others)
    return Side(*rest[:_SIDE]), _seeded(options, rng_state)


def _pack(side: Side, options: Options, rng_state: Tensor | None) -> tuple:
    scalars = options._asdict()
    del scalars["seed"], scalars["offset"]
    return (*side, rng_state, *scalars.values())


def _fwd(q, k, v, s_aux, *rest):
    return run_forward(q, k, v, s_aux, *_unpack(rest))


def _fwd_fake(q, k, v, s_aux, *rest):
    lse_shape = (q.shape[0], q.shape[2], q.shape[1]) if q.dim() == 4 else (q.shape[1], q.shape[0])
    return q.new_empty((*q.shape[:-1], v.shape[-1])), q.new_empty(lse_shape, dtype=torch.float32)


def _bwd(dout, dlse, q, k, v, out, lse, s_aux, *rest):
    dq, dk, dv, ds_aux = run_backward(dout, dlse, q, k, v, out, lse, s_aux, *_unpack(rest))
    return dq, dk, dv, q.new_empty(0) if ds_aux is None else ds_aux


def _bwd_fake(dout, dlse, q, k, v, out, lse, s_aux, *rest):
    ds_aux = q.new_empty(0) if s_aux is None else s_aux.new_empty(s_aux.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), ds_aux


def _setup(ctx, inputs, output):
    q, k, v, s_aux, *rest = inputs
    tensors = [t for t in rest if isinstance(t, Tensor)]
    ctx.save_for_backward(q, k, v, s_aux, *output, *tensors)
    ctx.rest = [None if isinstance(t, Tensor) else (t,) for t in rest]


def _differentiate(ctx, dout, dlse):
    q, k, v, s_aux, out, lse, *tensors = ctx.saved_tensors
    saved = iter(tensors)
    rest = [next(saved) if r is None else r[0] for r in ctx.rest]
    if dout is None:
        dout = torch.zeros_like(out)
    dq, dk, dv, ds_aux = torch.ops.strobe.bwd(dout, dlse, q, k, v, out, lse, s_aux, *rest)
    return (dq, dk, dv, None if s_aux is None else ds_aux, *(None for _ in rest))


_library.impl("fwd", _fwd, "CPU")
_library.impl("bwd", _bwd, "CPU")
torch.library.register_fake("strobe::fwd", _fwd_fake, lib=_library)
torch.library.register_fake("strobe::bwd", _bwd_fake, lib=_library)
torch.library.register_autograd("strobe::fwd", _differentiate, setup_context=_setup, lib=_library)

_PLAIN = (torch.Tensor, torch.nn.Parameter)


def attend(q, k, v, s_aux, side: Side, options: Options, out=None, return_attn_probs=False):
    """A call of the public functions: out, or (out, lse, S_dmask). The extension checks values."""
    drop = options.dropout_p > 0
    if torch.compiler.is_compiling() or _traced(q, k, v, s_aux):
        if out is not None or (return_attn_probs and drop):
            raise NotImplementedError(
                f"{options.function}: out= and return_attn_probs with dropout are for eager calls"
            )
        rng_state = torch.randint(0, 2**62, (2,)) if drop else None
        out, lse = torch.ops.strobe.fwd(q, k, v, s_aux, *_pack(side, options, rng_state))
        return (out, lse, q.new_empty(0)) if return_attn_probs else out
    if torch.autograd.forward_ad._current_level >= 0:
        for x in (q, k, v, s_aux):
            if isinstance(x, Tensor) and torch.autograd.forward_ad.unpack_dual(x).tangent is not None:
                raise NotImplementedError(f"{options.function}: forward-mode derivatives are not implemented")
    if drop:
        options = _seeded(options, torch.randint(0, 2**62, (2,)))
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


def _s_dmask(q, k, v, out, lse, s_aux, side: Side, options: Options) -> Tensor:
    """[batch, num_heads, rows, cols] probabilities, negative where dropped; rows and cols are rounded up to 128."""
    paged = side.page_table is not None
    capacity = side.page_table.shape[1] * k.shape[1] if paged else k.shape[1]
    packed = side.cu_seqlens_q is not None
    rows = options.max_seqlen_q if packed else q.shape[1]
    cols = options.max_seqlen_k if packed else capacity
    batch = side.cu_seqlens_q.shape[0] - 1 if packed else q.shape[0]
    s_dmask = torch.empty(batch, q.shape[-2], -(-rows // 128) * 128, -(-cols // 128) * 128, dtype=q.dtype)
    tensors = [t.detach() if isinstance(t, Tensor) else t for t in (q, k, v, out, lse, *side, s_aux)]
    _C.probabilities(tuple(tensors), options, s_dmask)
    return s_dmask


def _traced(*tensors) -> bool:
    if torch._C._len_torch_dispatch_stack() > 0:
        return True
    return any(isinstance(t, Tensor) and type(t) not in _PLAIN for t in tensors)
