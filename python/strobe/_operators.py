"""The operators that tracing sees, strobe::fwd, bwd and kvcache: with fake kernels, autograd and vmap."""

import torch
from torch import Tensor

from strobe import _C
from strobe._extension import Options, Side, run_backward, run_forward

_SIDE = len(Side._fields)
_SIDE_SCHEMA = ", ".join(f"Tensor? {name}" for name in Side._fields)
_OPTION_SCHEMA = (
    "Tensor? rng_state, str function, SymInt max_seqlen_q, SymInt max_seqlen_k, float? softmax_scale, float softcap, "
    "float dropout_p, bool causal, SymInt window_left, SymInt window_right, SymInt keep_first, bool force_fa_decode, "
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
_library.define(
    f"kvcache(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor? s_aux, {_SIDE_SCHEMA}, {_OPTION_SCHEMA}, "
    "Tensor? k, Tensor? v, Tensor? rotary_cos, Tensor? rotary_sin, bool rotary_interleaved) -> (Tensor, Tensor)"
)


def _pack(side: Side, options: Options, rng_state: Tensor | None) -> tuple:
    scalars = list(options[:-2])  # without seed and offset
    window = Options._fields.index("window_size")
    scalars[window : window + 1] = options.window_size
    return (*side, rng_state, *scalars)


def _unpack(rest) -> tuple[Side, Options]:
    side, rng_state, scalars = Side(*rest[:_SIDE]), rest[_SIDE], list(rest[_SIDE + 1 :])
    window = Options._fields.index("window_size")
    scalars[window : window + 2] = [tuple(scalars[window : window + 2])]
    return side, Options(*scalars).seeded(rng_state)


def forward_operator(q, k, v, s_aux, side: Side, options: Options, rng_state: Tensor | None):
    return torch.ops.strobe.fwd(q, k, v, s_aux, *_pack(side, options, rng_state))


def backward_operator(dout, dlse, q, k, v, out, lse, s_aux, side: Side, options: Options):
    rng_state = torch.tensor((options.seed, options.offset), device="cpu") if options.dropout_p > 0 else None
    dout = torch.zeros_like(out) if dout is None else dout
    dq, dk, dv, ds_aux = torch.ops.strobe.bwd(dout, dlse, q, k, v, out, lse, s_aux, *_pack(side, options, rng_state))
    return dq, dk, dv, None if s_aux is None else ds_aux


def kvcache_operator(q, k_cache, v_cache, s_aux, side: Side, options: Options, extra, rotary_interleaved):
    packed = _pack(side, options, None)
    return torch.ops.strobe.kvcache(q, k_cache, v_cache, s_aux, *packed, *extra, rotary_interleaved)


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


def _kvcache(q, k_cache, v_cache, s_aux, *rest):
    *rest, k, v, rotary_cos, rotary_sin, rotary_interleaved = rest
    side, options = _unpack(rest)
    flat = (q, k_cache, v_cache, s_aux, None, *side, *options)
    return _C.kvcache(flat, (k, v, rotary_cos, rotary_sin), rotary_interleaved)


def _setup(ctx, inputs, output):
    ctx.set_materialize_grads(False)
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


def _refuse_second(ctx, *gradients):
    raise RuntimeError(f"{ctx.function}: second derivatives are not implemented")


def _setup_backward(ctx, inputs, output):
    ctx.function = inputs[8 + _SIDE + 1]


def _vmap_of(operator):
    def rule(info, in_dims, *args):
        results = []
        for n in range(info.batch_size):
            entry = [
                a.select(d, n) if isinstance(a, Tensor) and d is not None else a
                for a, d in zip(args, in_dims, strict=True)
            ]
            results.append(operator(*entry))
        stacked = tuple(torch.stack(column) for column in zip(*results, strict=True))
        return stacked, tuple(0 for _ in stacked)

    return rule


for _name, _kernel, _fake in (
    ("fwd", _fwd, _fwd_fake),
    ("bwd", _bwd, _bwd_fake),
    ("kvcache", _kvcache, _fwd_fake),
):
    for _device in ("CPU", "CUDA"):
        _library.impl(_name, _kernel, _device)
    torch.library.register_fake(f"strobe::{_name}", _fake, lib=_library)
torch.library.register_autograd("strobe::fwd", _differentiate, setup_context=_setup, lib=_library)
torch.library.register_autograd("strobe::bwd", _refuse_second, setup_context=_setup_backward, lib=_library)
torch.library.register_vmap("strobe::fwd", _vmap_of(torch.ops.strobe.fwd), lib=_library)
torch.library.register_vmap("strobe::bwd", _vmap_of(torch.ops.strobe.bwd), lib=_library)
