"""FlashAttention 3's public functions. Empty rows have LSE -inf here; hints about speed change no bit."""

import functools

import torch
from torch import Tensor

import strobe
from strobe._arguments import one_of
from strobe.compat import fa2
from strobe.compat.arguments import hints, lse_of_fa3, no_float8
from strobe.compat.fa3_attend import attend, attend_with_cache


def _extra(function, keep_first, force_fa_decode, full_from, s_aux, sinks, learnable_sink, backend):
    s_aux = one_of(function, s_aux=s_aux, sinks=sinks, learnable_sink=learnable_sink)
    return dict(
        keep_first=keep_first, force_fa_decode=force_fa_decode, full_from=full_from, s_aux=s_aux, backend=backend
    )


def _flex_dense(function):
    """FlexHeadFA's sixth argument is deterministic, where FlashAttention 3 has the tensor qv."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        if len(args) == 6 and isinstance(args[5], bool):
            return function(*args[:5], deterministic=args[5], **kwargs)
        return function(*args, **kwargs)

    return call


def _flex_varlen(function):
    """FlexHeadFA goes on with softmax_scale, causal, deterministic, where FlashAttention 3 has the tensors seqused_q
    and seqused_k, and returns (out, lse)."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        more = args[7:10]
        if more and len(args) <= 10 and (isinstance(more[0], float) or any(isinstance(x, bool) for x in more)):
            names = ("softmax_scale", "causal", "deterministic")
            options = dict(zip(names, more, strict=False))
            doubled = sorted(set(options) & set(kwargs))
            if doubled:
                raise TypeError(f"{function.__name__}: {doubled[0]} is given by position and by keyword")
            return function(*args[:7], **options, **kwargs, return_attn_probs=True)
        return function(*args, **kwargs)

    return call


@_flex_dense
def flash_attn_func(
    q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
    window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
    sm_margin=0, return_attn_probs=False, *, keep_first=0, force_fa_decode=False, full_from=None, s_aux=None,
    sinks=None, learnable_sink=None, backend=None,
):  # fmt: skip
    """Attention of q [batch, seqlen_q, heads, dim]; out, or (out, lse) with return_attn_probs.

    qv [batch, seqlen_q, heads, head_dim_v] adds qv.v to the scores; attention_chunk hides the keys of other chunks.
    """
    function = "flash_attn_func"
    descales = q_descale is not None or k_descale is not None or v_descale is not None
    special = qv is not None or attention_chunk or return_attn_probs or descales or q.dtype.itemsize == 1
    if not special and num_splits == 1 and pack_gqa is None and sm_margin == 0:
        return strobe.flash_attn_func(  # at once: its host time counts
            q, k, v, 0.0, softmax_scale, causal, window_size, softcap, None, deterministic, keep_first=keep_first,
            force_fa_decode=force_fa_decode, full_from=full_from, s_aux=s_aux, sinks=sinks,
            learnable_sink=learnable_sink, backend=backend,
        )  # fmt: skip
    no_float8(function, q=q, k=k, v=v, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale)
    hints(function, num_splits=num_splits, pack_gqa=pack_gqa, sm_margin=sm_margin)
    result = attend(
        function, q, k, v, qv=qv, softmax_scale=softmax_scale, causal=causal, window_size=window_size,
        attention_chunk=attention_chunk, softcap=softcap, deterministic=deterministic,
        **_extra(function, keep_first, force_fa_decode, full_from, s_aux, sinks, learnable_sink, backend),
    )  # fmt: skip
    return result if return_attn_probs else result[0]


def flash_attn_qkvpacked_func(
    qkv, softmax_scale=None, causal=False, q_descale=None, k_descale=None, v_descale=None, window_size=(-1, -1),
    attention_chunk=0, softcap=0.0, deterministic=False, num_heads_q=None, sm_margin=0, return_attn_probs=False, *,
    keep_first=0, force_fa_decode=False, full_from=None, s_aux=None, sinks=None, learnable_sink=None, backend=None,
):  # fmt: skip
    """qkv [batch, seqlen, 3, heads, dim], or [batch, seqlen, heads_q + 2 * heads_k, dim] with num_heads_q."""
    function = "flash_attn_qkvpacked_func"
    if qkv.dim() == 5 and qkv.shape[2] == 3 and num_heads_q is None:
        q, k, v = qkv.unbind(2)
    elif qkv.dim() == 4 and num_heads_q is not None and (qkv.shape[2] - num_heads_q) % 2 == 0:
        heads_k = (qkv.shape[2] - num_heads_q) // 2
        q, k, v = qkv.split((num_heads_q, heads_k, heads_k), 2)
    else:
        raise ValueError(
            f"{function}: qkv is {list(qkv.shape)} and num_heads_q {num_heads_q}, it takes [batch, seqlen, 3, heads, "
            "dim] or, with num_heads_q, [batch, seqlen, heads_q + 2 * heads_k, dim]"
        )
    return flash_attn_func(
        q, k, v, softmax_scale, causal, None, q_descale, k_descale, v_descale, window_size, attention_chunk, softcap,
        deterministic=deterministic, sm_margin=sm_margin, return_attn_probs=return_attn_probs, keep_first=keep_first,
        force_fa_decode=force_fa_decode, full_from=full_from, s_aux=s_aux, sinks=sinks, learnable_sink=learnable_sink,
        backend=backend,
    )  # fmt: skip


@_flex_varlen
def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
    softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None, window_size=(-1, -1),
    attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0,
    return_attn_probs=False, *, page_table=None, keep_first=0, force_fa_decode=False, full_from=None, s_aux=None,
    sinks=None, learnable_sink=None, backend=None,
):  # fmt: skip
    """`flash_attn_func` over packed sequences; lse is [heads, total_q]."""
    function = "flash_attn_varlen_func"
    no_float8(function, q=q, k=k, v=v, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale)
    hints(function, num_splits=num_splits, pack_gqa=pack_gqa, sm_margin=sm_margin)
    result = attend(
        function, q, k, v, qv=qv, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, seqused_q=seqused_q,
        seqused_k=seqused_k, max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k, page_table=page_table,
        softmax_scale=softmax_scale, causal=causal, window_size=window_size, attention_chunk=attention_chunk,
        softcap=softcap, deterministic=deterministic,
        **_extra(function, keep_first, force_fa_decode, full_from, s_aux, sinks, learnable_sink, backend),
    )  # fmt: skip
    return result if return_attn_probs else result[0]


def flash_attn_with_kvcache(
    q, k_cache, v_cache, k=None, v=None, qv=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None,
    cache_batch_idx=None, cache_leftpad=None, page_table=None, cu_seqlens_q=None, cu_seqlens_k_new=None,
    max_seqlen_q=None, rotary_seqlens=None, q_descale=None, k_descale=None, v_descale=None, softmax_scale=None,
    causal=False, window_size=(-1, -1), attention_chunk=0, softcap=0.0, rotary_interleaved=True,
    scheduler_metadata=None, num_splits=0, pack_gqa=None, sm_margin=0, return_softmax_lse=False, *, keep_first=0,
    force_fa_decode=False, full_from=None, s_aux=None, sinks=None, learnable_sink=None, backend=None,
):  # fmt: skip
    """Appends k and v to the caches in place, then attends; out, or (out, lse, out_accum, lse_accum) with
    return_softmax_lse, the last two empty. q may be packed, with cu_seqlens_q and max_seqlen_q. Not differentiable."""
    function = "flash_attn_with_kvcache"
    wishes = num_splits != 0 or sm_margin != 0 or pack_gqa is not None or scheduler_metadata is not None
    ragged = cu_seqlens_q is not None or cu_seqlens_k_new is not None or max_seqlen_q is not None
    both = page_table is not None and cache_batch_idx is not None
    descaled = q_descale is not None or k_descale is not None or v_descale is not None
    small = q.dtype.itemsize == 1 or k_cache.dtype.itemsize == 1
    special = wishes or ragged or both or descaled or small or return_softmax_lse or attention_chunk
    if not special and qv is None and rotary_seqlens is None:
        return fa2.flash_attn_with_kvcache(  # at once: its host time counts
            q, k_cache, v_cache, k, v, rotary_cos, rotary_sin, cache_seqlens, cache_batch_idx, cache_leftpad,
            page_table, softmax_scale, causal, window_size, softcap, rotary_interleaved=rotary_interleaved,
            keep_first=keep_first, force_fa_decode=force_fa_decode, full_from=full_from, s_aux=s_aux, sinks=sinks,
            learnable_sink=learnable_sink, backend=backend,
        )  # fmt: skip
    descales = dict(q_descale=q_descale, k_descale=k_descale, v_descale=v_descale)
    no_float8(function, q=q, k_cache=k_cache, v_cache=v_cache, **descales)
    hints(
        function, num_splits=num_splits, pack_gqa=pack_gqa, sm_margin=sm_margin, scheduler_metadata=scheduler_metadata
    )
    call = dict(
        rotary_cos=rotary_cos, rotary_sin=rotary_sin, cache_seqlens=cache_seqlens, cache_batch_idx=cache_batch_idx,
        page_table=page_table, softmax_scale=softmax_scale, causal=causal, window_size=window_size, softcap=softcap,
        rotary_interleaved=rotary_interleaved,
        **_extra(function, keep_first, force_fa_decode, full_from, s_aux, sinks, learnable_sink, backend),
    )  # fmt: skip
    special = (qv, cu_seqlens_q, cu_seqlens_k_new, rotary_seqlens)
    with torch.no_grad():
        if (
            any(x is not None for x in special)
            or attention_chunk
            or not (page_table is None or cache_batch_idx is None)
        ):
            out, lse = attend_with_cache(
                function, q, k_cache, v_cache, k, v, qv=qv, cu_seqlens_q=cu_seqlens_q,
                cu_seqlens_k_new=cu_seqlens_k_new, max_seqlen_q=max_seqlen_q, rotary_seqlens=rotary_seqlens,
                attention_chunk=attention_chunk, leftpad_k=cache_leftpad, **call,
            )  # fmt: skip
        else:
            out, lse = fa2.flash_attn_with_kvcache(
                q, k_cache, v_cache, k, v, cache_leftpad=cache_leftpad, return_softmax_lse=True, **call
            )
            lse = lse_of_fa3(lse) if return_softmax_lse else lse
    if not return_softmax_lse:
        return out
    none = q.new_empty(0, dtype=torch.float32)
    return out, lse, none, none.clone()


def get_scheduler_metadata(
    batch_size, max_seqlen_q, max_seqlen_k, num_heads_q, num_heads_kv, headdim, cache_seqlens: Tensor,
    qkv_dtype=torch.bfloat16, headdim_v=None, cu_seqlens_q=None, cu_seqlens_k_new=None, cache_leftpad=None,
    page_size=None, max_seqlen_k_new=0, causal=False, window_size=(-1, -1), attention_chunk=0, has_softcap=False,
    num_splits=0, pack_gqa=None, sm_margin=0,
) -> Tensor:  # fmt: skip
    """An int32 tensor of FlashAttention 3's length, all 0: a plan needs nothing from it, so that a padded graph may
    pass one of any length."""
    function = "get_scheduler_metadata"
    no_float8(function, qkv_dtype=torch.empty(0, dtype=qkv_dtype))
    hints(function, num_splits=num_splits, pack_gqa=pack_gqa, sm_margin=sm_margin)
    windowed = tuple(window_size) != (-1, -1) or attention_chunk > 0
    per_sequence = 2 + (not windowed) + (causal or windowed)
    return torch.zeros(-(-batch_size // 4) * 4 * per_sequence + 1, dtype=torch.int32, device=cache_seqlens.device)
