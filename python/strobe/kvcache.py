"""Decoding with a cache of keys and values."""

import torch
from torch.compiler import is_dynamo_compiling

from strobe import _C
from strobe._arguments import last_contiguous, lengths, one_of, options, sinks_of, whole
from strobe._attend import attend_with_cache
from strobe._extension import Side
from strobe.interface import _batch


def flash_attn_with_kvcache(
    q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, cache_batch_idx=None,
    cache_leftpad=None, block_table=None, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
    rotary_interleaved=True, alibi_slopes=None, num_splits=0, return_softmax_lse=False, *, keep_first=0,
    force_fa_decode=False, full_from=None, s_aux=None, sinks=None, learnable_sink=None, page_table=None, out=None,
    backend=None,
):  # fmt: skip
    """Appends k and v to the caches in place, then attends to all that the caches hold. Not differentiable.

    Args:
        q: [batch, seqlen_q, num_heads, head_dim].
        k_cache, v_cache: [batch_cache, capacity, heads, dim], or pages [num_pages, page_size, heads, dim].
        k, v: [batch, seqlen_new, heads, dim], written at cache_seqlens.
        rotary_cos, rotary_sin: [seqlen_ro, rotary_dim / 2], dtype of q; turn k, and q, by their position in the cache.
        cache_seqlens: int or int32 [batch]: keys in the cache before this call; the whole capacity if None.
        cache_batch_idx: int32 [batch]: row of the cache of each sequence.
        cache_leftpad: int32 [batch]: keys to skip at the front.
        block_table, page_table: int32 [batch, max_pages], two names of one argument.
        rotary_interleaved: pairs (0, 1), (2, 3), ...; False: halves.
        num_splits: accepted for compatibility; the split is planned from the problem.
        The others are those of `flash_attn_func`.

    Returns:
        out [batch, seqlen_q, num_heads, head_dim_v], or (out, lse) with return_softmax_lse.

    Raises:
        ValueError, TypeError: an argument is not allowed; nothing was written.
    """
    function = "flash_attn_with_kvcache"
    s_aux = one_of(function, s_aux=s_aux, sinks=sinks, learnable_sink=learnable_sink)
    page_table = one_of(function, block_table=block_table, page_table=page_table)
    if not is_dynamo_compiling() and type(num_splits) is int:
        result = _C.attend_with_cache(
            q, k_cache, v_cache, s_aux, out, None, None, None, cache_seqlens, cache_leftpad, page_table,
            cache_batch_idx, full_from, alibi_slopes, function, -1, -1, softmax_scale, softcap, 0.0, causal,
            window_size, keep_first, force_fa_decode, False, backend, 0, 0, k, v, rotary_cos, rotary_sin,
            rotary_interleaved, return_softmax_lse,
        )  # fmt: skip
        if result is not NotImplemented:
            return result
    whole(function, "num_splits", num_splits)
    call = options(
        function, softmax_scale=softmax_scale, causal=causal, window_size=window_size, softcap=softcap,
        keep_first=keep_first, force_fa_decode=force_fa_decode, backend=backend,
    )  # fmt: skip
    if torch.is_grad_enabled() and any(getattr(x, "requires_grad", False) for x in (q, k_cache, v_cache, k, v)):
        raise ValueError(f"{function}: an input requires a gradient; a cache has none, use torch.no_grad()")
    q, k, v = map(last_contiguous, (q, k, v))
    side = Side(
        seqused_k=lengths(function, "cache_seqlens", cache_seqlens, _batch(q), q),
        leftpad_k=cache_leftpad,
        page_table=page_table,
        cache_batch_idx=cache_batch_idx,
        full_from=lengths(function, "full_from", full_from, _batch(q), q),
        alibi_slopes=alibi_slopes,
    )
    extra = (k, v, rotary_cos, rotary_sin)
    out, lse = attend_with_cache(q, k_cache, v_cache, sinks_of(s_aux), side, call, extra, bool(rotary_interleaved), out)
    return (out, lse) if return_softmax_lse else out
