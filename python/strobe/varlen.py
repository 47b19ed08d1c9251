"""Attention over packed sequences of any lengths, with paged keys if wanted."""

from torch.compiler import is_dynamo_compiling

from strobe import _C
from strobe._arguments import autocast, last_contiguous, lengths, one_of, options, sinks_of
from strobe._attend import attend
from strobe._extension import Side
from strobe.interface import _shape


def _packed(
    function, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
    window_size, softcap, alibi_slopes, deterministic, return_attn_probs, keep_first, force_fa_decode, full_from, s_aux,
    backend, seqused_q=None, seqused_k=None, leftpad_k=None, page_table=None, out=None,
):  # fmt: skip
    if not is_dynamo_compiling():
        result = _C.attend(
            q, k, v, s_aux, out, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, leftpad_k, page_table, None,
            full_from, alibi_slopes, function, max_seqlen_q, max_seqlen_k, softmax_scale, softcap, dropout_p, causal,
            window_size, keep_first, force_fa_decode, deterministic, backend, 0, 0, return_attn_probs,
        )  # fmt: skip
        if result is not NotImplemented:
            return (*result, q.new_empty(0)) if return_attn_probs is True else result
    call = options(
        function, softmax_scale=softmax_scale, causal=causal, window_size=window_size, softcap=softcap,
        keep_first=keep_first, force_fa_decode=force_fa_decode, backend=backend, dropout_p=dropout_p,
        deterministic=deterministic, max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k,
    )  # fmt: skip
    q, k, v = map(last_contiguous, autocast(q, k, v))
    batch = max(0, cu_seqlens_q.shape[0] - 1) if getattr(cu_seqlens_q, "shape", ()) else 0
    side = Side(
        cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, leftpad_k, page_table, None,
        lengths(function, "full_from", full_from, batch, q), alibi_slopes,
    )  # fmt: skip
    return attend(q, k, v, sinks_of(s_aux), side, call, out, return_attn_probs)


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
    block_table=None, *, keep_first=0, force_fa_decode=False, full_from=None, s_aux=None, sinks=None,
    learnable_sink=None, seqused_q=None, seqused_k=None, leftpad_k=None, page_table=None, out=None, backend=None,
):  # fmt: skip
    """`flash_attn_func` over packed sequences.

    Args:
        q: [total_q, num_heads, head_dim]; sequence b is rows cu_seqlens_q[b] .. cu_seqlens_q[b + 1] - 1.
        k, v: [total_k, num_heads_k, head_dim] and [total_k, num_heads_v, head_dim_v], or pages
            [num_pages, page_size, heads, dim] with page_table.
        cu_seqlens_q, cu_seqlens_k: int32 [batch + 1], from 0 to total_q and total_k.
        max_seqlen_q, max_seqlen_k: the longest lengths.
        block_table, page_table: int32 [batch, max_pages], two names of one argument; -1 in unused columns.
        seqused_q, seqused_k: int32 [batch]: rows used of each sequence. leftpad_k: int32 [batch]: keys to skip.
        The others are those of `flash_attn_func`.

    Returns:
        out [total_q, num_heads, head_dim_v], or (out, lse, S_dmask) with lse float32 [num_heads, total_q].

    Raises:
        ValueError, TypeError: an argument is not allowed; nothing was written.
    """
    function = "flash_attn_varlen_func"
    return _packed(
        function, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size, softcap, alibi_slopes, deterministic, return_attn_probs, keep_first, force_fa_decode, full_from,
        one_of(function, s_aux=s_aux, sinks=sinks, learnable_sink=learnable_sink), backend, seqused_q, seqused_k,
        leftpad_k, one_of(function, block_table=block_table, page_table=page_table), out,
    )  # fmt: skip


def flash_attn_varlen_kvpacked_func(
    q, kv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False, *, keep_first=0,
    force_fa_decode=False, full_from=None, s_aux=None, sinks=None, learnable_sink=None, backend=None,
):  # fmt: skip
    """`flash_attn_varlen_func` with k and v in one tensor: kv [total_k, 2, num_heads_k, head_dim]."""
    function = "flash_attn_varlen_kvpacked_func"
    if getattr(kv, "ndim", 0) != 4 or kv.shape[1] != 2:
        raise ValueError(f"{function}: kv has shape {_shape(kv)}, it takes [total_k, 2, num_heads_k, head_dim]")
    return _packed(
        function, q, *kv.unbind(1), cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale,
        causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs, keep_first, force_fa_decode,
        full_from, one_of(function, s_aux=s_aux, sinks=sinks, learnable_sink=learnable_sink), backend,
    )  # fmt: skip


def flash_attn_varlen_qkvpacked_func(
    qkv, cu_seqlens, max_seqlen, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
    alibi_slopes=None, deterministic=False, return_attn_probs=False, *, keep_first=0, force_fa_decode=False,
    full_from=None, s_aux=None, sinks=None, learnable_sink=None, backend=None,
):  # fmt: skip
    """`flash_attn_varlen_func` with q, k and v in one tensor: qkv [total, 3, num_heads, head_dim]."""
    function = "flash_attn_varlen_qkvpacked_func"
    if getattr(qkv, "ndim", 0) != 4 or qkv.shape[1] != 3:
        raise ValueError(f"{function}: qkv has shape {_shape(qkv)}, it takes [total, 3, num_heads, head_dim]")
    return _packed(
        function, *qkv.unbind(1), cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p, softmax_scale, causal,
        window_size, softcap, alibi_slopes, deterministic, return_attn_probs, keep_first, force_fa_decode, full_from,
        one_of(function, s_aux=s_aux, sinks=sinks, learnable_sink=learnable_sink), backend,
    )  # fmt: skip
