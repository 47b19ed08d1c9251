"""flash_attn_3's operators: the private functions as custom ops, and the schemas of its extension."""

import torch
from torch import Tensor
from torch.library import custom_op

from strobe._arguments import last_contiguous, options
from strobe._extension import Side, run_backward
from strobe.compat import fa3
from strobe.compat.arguments import hints, lse_of_fa2, no_float8
from strobe.compat.combine import flash_attn_combine
from strobe.compat.fa3_attend import _offsets, attend, attend_with_cache
from strobe.compat.raw import softmax_d
from strobe.compat.tail import with_tail


def _forward(
    q, k, v, k_new, v_new, qv, out_, cu_seqlens_q, cu_seqlens_k, cu_seqlens_k_new, seqused_q, seqused_k, max_seqlen_q,
    max_seqlen_k, page_table, kv_batch_idx, leftpad_k, rotary_cos, rotary_sin, seqlens_rotary, q_descale, k_descale,
    v_descale, softmax_scale, causal, window_size_left, window_size_right, attention_chunk, softcap,
    rotary_interleaved, scheduler_metadata, num_splits, pack_gqa, sm_margin,
):  # fmt: skip
    function = "_flash_attn_forward"
    no_float8(function, q=q, k=k, v=v, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale)
    hints(
        function, num_splits=num_splits, pack_gqa=pack_gqa, sm_margin=sm_margin, scheduler_metadata=scheduler_metadata
    )
    call = dict(
        qv=qv, cu_seqlens_q=cu_seqlens_q, max_seqlen_q=max_seqlen_q, page_table=page_table,
        cache_batch_idx=kv_batch_idx, leftpad_k=leftpad_k, softmax_scale=softmax_scale, causal=causal,
        window_size=(window_size_left, window_size_right), attention_chunk=attention_chunk, softcap=softcap,
    )  # fmt: skip
    if k_new is None:
        if rotary_cos is not None:
            raise ValueError(f"{function}: rotary_cos is given but k_new is not, allowed is both")
        out, lse = attend(
            function, q, k, v, cu_seqlens_k=cu_seqlens_k, seqused_q=seqused_q, seqused_k=seqused_k,
            max_seqlen_k=max_seqlen_k, **call,
        )  # fmt: skip
    else:
        if seqused_q is not None:
            raise NotImplementedError(f"{function}: seqused_q with k_new is not implemented")
        out, lse = attend_with_cache(
            function, q, k, v, k_new, v_new, cache_seqlens=seqused_k, cu_seqlens_k_new=cu_seqlens_k_new,
            rotary_cos=rotary_cos, rotary_sin=rotary_sin, rotary_seqlens=seqlens_rotary,
            rotary_interleaved=rotary_interleaved, **call,
        )  # fmt: skip
    if out_ is not None:
        out_.copy_(out)
    none = q.new_empty(0, dtype=torch.float32)
    return out, lse.contiguous(), none, none.clone()


@custom_op("flash_attn_3::_flash_attn_forward", mutates_args=())
def _flash_attn_forward(
    q: Tensor, k: Tensor, v: Tensor, k_new: Tensor | None = None, v_new: Tensor | None = None,
    qv: Tensor | None = None, out_: Tensor | None = None, cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None, cu_seqlens_k_new: Tensor | None = None, seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None, max_seqlen_q: int | None = None, max_seqlen_k: int | None = None,
    page_table: Tensor | None = None, kv_batch_idx: Tensor | None = None, leftpad_k: Tensor | None = None,
    rotary_cos: Tensor | None = None, rotary_sin: Tensor | None = None, seqlens_rotary: Tensor | None = None,
    q_descale: Tensor | None = None, k_descale: Tensor | None = None, v_descale: Tensor | None = None,
    softmax_scale: float | None = None, causal: bool = False, window_size_left: int = -1, window_size_right: int = -1,
    attention_chunk: int = 0, softcap: float = 0.0, rotary_interleaved: bool = True,
    scheduler_metadata: Tensor | None = None, num_splits: int = 1, pack_gqa: bool | None = None, sm_margin: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _forward(
        q, k, v, k_new, v_new, qv, out_, cu_seqlens_q, cu_seqlens_k, cu_seqlens_k_new, seqused_q, seqused_k,
        max_seqlen_q, max_seqlen_k, page_table, kv_batch_idx, leftpad_k, rotary_cos, rotary_sin, seqlens_rotary,
        q_descale, k_descale, v_descale, softmax_scale, causal, window_size_left, window_size_right, attention_chunk,
        softcap, rotary_interleaved, scheduler_metadata, num_splits, pack_gqa, sm_margin,
    )  # fmt: skip


@_flash_attn_forward.register_fake
def _(q, k, v, k_new=None, v_new=None, qv=None, out_=None, cu_seqlens_q=None, *rest, **more):
    if k_new is not None or out_ is not None:
        raise NotImplementedError("_flash_attn_forward: k_new and out_ are for eager calls")
    lse = (q.shape[0], q.shape[2], q.shape[1]) if q.dim() == 4 else (q.shape[1], q.shape[0])
    none = q.new_empty(0, dtype=torch.float32)
    out = q.new_empty((*q.shape[:-1], v.shape[-1]))
    return out, q.new_empty(lse, dtype=torch.float32), none, none.clone()


@custom_op("flash_attn_3::_flash_attn_backward", mutates_args=("dq", "dk", "dv"))
def _flash_attn_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor,
    cu_seqlens_q: Tensor | None = None, cu_seqlens_k: Tensor | None = None, sequed_q: Tensor | None = None,
    sequed_k: Tensor | None = None, max_seqlen_q: int | None = None, max_seqlen_k: int | None = None,
    dq: Tensor | None = None, dk: Tensor | None = None, dv: Tensor | None = None, softmax_scale: float | None = None,
    is_causal: bool = False, window_size_left: int = -1, window_size_right: int = -1, softcap: float = 0.0,
    deterministic: bool = False, sm_margin: int = 0,
) -> Tensor:  # fmt: skip
    gradients = _gradients(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, sequed_q, sequed_k, max_seqlen_q, max_seqlen_k,
        softmax_scale, is_causal, (window_size_left, window_size_right), softcap, deterministic, sm_margin,
    )  # fmt: skip
    for given, gradient in zip((dq, dk, dv), gradients, strict=True):
        if given is not None:
            given.copy_(gradient)
    return softmax_d(dout, out, cu_seqlens_q)


@_flash_attn_backward.register_fake
def _(dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, *rest, **more):
    if q.dim() == 4:
        shape = (q.shape[0], q.shape[2], (q.shape[1] + 127) // 128 * 128)
    else:
        shape = (q.shape[1], q.shape[0] + 128 * (cu_seqlens_q.shape[0] - 1))
    return q.new_empty(shape, dtype=torch.float32)


def _gradients(
    dout, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, max_seqlen_q, max_seqlen_k,
    softmax_scale, causal, window, softcap, deterministic, sm_margin,
):  # fmt: skip
    """(dq, dk, dv) in the shapes of q, k, v."""
    function = "_flash_attn_backward"
    hints(function, sm_margin=sm_margin)
    lse = lse_of_fa2(lse)
    shapes = [x.shape for x in (q, k, v)]
    if q.dim() == 4 and (seqused_q is not None or cu_seqlens_q is not None or cu_seqlens_k is not None):
        max_seqlen_q, max_seqlen_k = q.shape[1], k.shape[1]
        cu_seqlens_q, cu_seqlens_k = _offsets(q), _offsets(k)
        lse = lse.transpose(0, 1).flatten(1)
        dout, q, k, v, out = (x.flatten(0, 1) for x in (dout, q, k, v, out))
    lengths = dict(
        q=q, k=k, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, seqused_q=seqused_q, seqused_k=seqused_k,
        max_seqlen_q=-1 if max_seqlen_q is None else max_seqlen_q,
        max_seqlen_k=-1 if max_seqlen_k is None else max_seqlen_k,
    )  # fmt: skip
    if cu_seqlens_q is not None:
        lengths = with_tail(lengths) or lengths
    call = options(
        function, softmax_scale=softmax_scale, causal=causal, window_size=window, softcap=softcap, keep_first=0,
        force_fa_decode=False, backend=None, deterministic=deterministic, max_seqlen_q=lengths["max_seqlen_q"],
        max_seqlen_k=lengths["max_seqlen_k"],
    )  # fmt: skip
    side = Side(*(lengths[name] for name in ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k")))
    dout, q, k, v, out = map(last_contiguous, (dout, q, k, v, out))
    gradients = run_backward(dout, None, q, k, v, out, lse.contiguous(), None, side, call)[:3]
    return [g.reshape(shape) for g, shape in zip(gradients, shapes, strict=True)]


_INPUTS = [p.name for p in torch.ops.flash_attn_3._flash_attn_forward.default._schema.arguments]


def _setup(ctx, inputs, output):
    call = dict(zip(_INPUTS, inputs, strict=True))
    for name in ("k_new", "qv", "page_table", "kv_batch_idx", "leftpad_k"):
        if call[name] is not None:
            raise NotImplementedError(f"_flash_attn_forward: a gradient with {name} is not implemented")
    if call["attention_chunk"]:
        raise NotImplementedError("_flash_attn_forward: a gradient with attention_chunk is not implemented")
    lengths = ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k")
    ctx.save_for_backward(*(call[name] for name in ("q", "k", "v")), *output[:2], *(call[name] for name in lengths))
    names = ("softmax_scale", "window_size_left", "window_size_right", "softcap", "sm_margin")
    ctx.options = {name: call[name] for name in names} | dict(is_causal=call["causal"])
    ctx.longest = dict(max_seqlen_q=call["max_seqlen_q"], max_seqlen_k=call["max_seqlen_k"])


def _differentiate(ctx, dout, *rest):
    q, k, v, out, lse, *lengths = ctx.saved_tensors
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    names = ("cu_seqlens_q", "cu_seqlens_k", "sequed_q", "sequed_k")
    lengths = dict(zip(names, lengths, strict=True))
    _flash_attn_backward(dout, q, k, v, out, lse, dq=dq, dk=dk, dv=dv, **lengths, **ctx.longest, **ctx.options)
    return dq, dk, dv, *(None for _ in _INPUTS[3:])


_flash_attn_forward.register_autograd(_differentiate, setup_context=_setup)

_library = torch.library.Library("flash_attn_3", "FRAGMENT")
_library.define(
    "fwd(Tensor q, Tensor k, Tensor v, Tensor(k_new!)? k_new=None, Tensor(v_new!)? v_new=None, Tensor? q_v=None, "
    "Tensor(out!)? out=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, Tensor? cu_seqlens_k_new=None, "
    "Tensor? seqused_q=None, Tensor? seqused_k=None, int? max_seqlen_q=None, int? max_seqlen_k=None, "
    "Tensor? page_table=None, Tensor? kv_batch_idx=None, Tensor? leftpad_k=None, Tensor? rotary_cos=None, "
    "Tensor? rotary_sin=None, Tensor? seqlens_rotary=None, Tensor? q_descale=None, Tensor? k_descale=None, "
    "Tensor? v_descale=None, float? softmax_scale=None, bool is_causal=False, int window_size_left=-1, "
    "int window_size_right=-1, int attention_chunk=0, float softcap=0.0, bool is_rotary_interleaved=False, "
    "Tensor? scheduler_metadata=None, int num_splits=0, bool? pack_gqa=None, int sm_margin=0) "
    "-> (Tensor(out!), Tensor, Tensor, Tensor)"
)
_library.define(
    "bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, Tensor(dq!)? dq=None, "
    "Tensor(dk!)? dk=None, Tensor(dv!)? dv=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, "
    "Tensor? seqused_q=None, Tensor? seqused_k=None, int? max_seqlen_q=None, int? max_seqlen_k=None, "
    "float? softmax_scale=None, bool is_causal=False, int window_size_left=-1, int window_size_right=-1, "
    "float softcap=0.0, bool deterministic=False, int sm_margin=0) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "fwd_combine(Tensor out_partial, Tensor lse_partial, Tensor(out!)? out=None, ScalarType? out_dtype=None) "
    "-> (Tensor(out!), Tensor)"
)
_library.define(
    "get_scheduler_metadata(int batch_size, int max_seqlen_q, int max_seqlen_k, int num_heads, int num_heads_k, "
    "int headdim, int headdim_v, ScalarType qkv_dtype, Tensor seqused_k, Tensor? cu_seqlens_q=None, "
    "Tensor? cu_seqlens_k=None, Tensor? cu_seqlens_k_new=None, Tensor? seqused_q=None, Tensor? leftpad_k=None, "
    "int? page_size=None, int max_seqlen_k_new=0, bool is_causal=False, int window_size_left=-1, "
    "int window_size_right=-1, int attention_chunk=0, bool has_softcap=False, int num_splits=0, "
    "bool? pack_gqa=None, int sm_margin=0) -> Tensor"
)


def _fwd(q, k, v, k_new=None, v_new=None, q_v=None, out=None, *rest):
    defaults = torch.ops.flash_attn_3.fwd.default._schema.arguments[7 + len(rest) :]
    result, *more = _forward(q, k, v, k_new, v_new, q_v, out, *rest, *(a.default_value for a in defaults))
    return (result if out is None else out, *more)


def _bwd(dout, q, k, v, out, softmax_lse, dq=None, dk=None, dv=None, cu_seqlens_q=None, cu_seqlens_k=None,
         seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None, softmax_scale=None, is_causal=False,
         window_size_left=-1, window_size_right=-1, softcap=0.0, deterministic=False, sm_margin=0):  # fmt: skip
    delta = _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, max_seqlen_q, max_seqlen_k,
        dq, dk, dv, softmax_scale, is_causal, window_size_left, window_size_right, softcap, deterministic, sm_margin,
    )  # fmt: skip
    none = q.new_empty(0, dtype=torch.float32)
    return delta, softmax_lse * 1.4426950408889634, none, none.clone(), none.clone()


def _metadata(
    batch_size, max_seqlen_q, max_seqlen_k, num_heads, num_heads_k, headdim, headdim_v, qkv_dtype, seqused_k,
    cu_seqlens_q=None, cu_seqlens_k=None, cu_seqlens_k_new=None, seqused_q=None, leftpad_k=None, page_size=None,
    max_seqlen_k_new=0, is_causal=False, window_size_left=-1, window_size_right=-1, attention_chunk=0,
    has_softcap=False, num_splits=0, pack_gqa=None, sm_margin=0,
):  # fmt: skip
    return fa3.get_scheduler_metadata(
        batch_size, max_seqlen_q, max_seqlen_k, num_heads, num_heads_k, headdim, seqused_k, qkv_dtype, headdim_v,
        causal=is_causal, window_size=(window_size_left, window_size_right), attention_chunk=attention_chunk,
        num_splits=num_splits, pack_gqa=pack_gqa, sm_margin=sm_margin,
    )  # fmt: skip


for _device in ("CPU", "CUDA"):
    _library.impl("fwd", _fwd, _device)
    _library.impl("bwd", _bwd, _device)
    _library.impl("fwd_combine", flash_attn_combine, _device)
    _library.impl("get_scheduler_metadata", _metadata, _device)
