"""Attention over sequences of one length: FlashAttention 2's calls, with Strobe's options by keyword."""

from torch.compiler import is_dynamo_compiling

from strobe import _C
from strobe._arguments import autocast, last_contiguous, lengths, one_of, options, sinks_of
from strobe._attend import attend
from strobe._extension import Side


def _batch(q) -> int:
    return q.shape[0] if getattr(q, "shape", ()) else 0


def _dense(
    function, q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
    return_attn_probs, keep_first, force_fa_decode, full_from, s_aux, backend, seqused_k=None, out=None,
):  # fmt: skip
    if not is_dynamo_compiling():
        result = _C.attend(
            q, k, v, s_aux, out, None, None, None, seqused_k, None, None, None, full_from, alibi_slopes, function,
            -1, -1, softmax_scale, softcap, dropout_p, causal, window_size, keep_first, force_fa_decode, deterministic,
            backend, 0, 0, return_attn_probs,
        )  # fmt: skip
        if result is not NotImplemented:
            return (*result, q.new_empty(0)) if return_attn_probs is True else result
    call = options(
        function, softmax_scale=softmax_scale, causal=causal, window_size=window_size, softcap=softcap,
        keep_first=keep_first, force_fa_decode=force_fa_decode, backend=backend, dropout_p=dropout_p,
        deterministic=deterministic,
    )  # fmt: skip
    q, k, v = map(last_contiguous, autocast(q, k, v))
    side = Side(
        seqused_k=lengths(function, "seqused_k", seqused_k, _batch(q), q),
        full_from=lengths(function, "full_from", full_from, _batch(q), q),
        alibi_slopes=alibi_slopes,
    )
    return attend(q, k, v, sinks_of(s_aux), side, call, out, return_attn_probs)


def flash_attn_func(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False, *, keep_first=0, force_fa_decode=False, full_from=None, s_aux=None,
    sinks=None, learnable_sink=None, seqused_k=None, out=None, backend=None,
):  # fmt: skip
    """Exact attention, differentiable in q, k, v and s_aux.

    Query i sees key j if ``j < min(seqlen_k, i + off + right + 1)`` and (``j >= i + off - left`` or
    ``j < keep_first``), with ``off = seqlen_k - seqlen_q``.

    Args:
        q: [batch, seqlen_q, num_heads, head_dim], float32, float16 or bfloat16.
        k: [batch, seqlen_k, num_heads_k, head_dim], dtype of q. num_heads_k divides num_heads.
        v: [batch, seqlen_k, num_heads_v, head_dim_v]. num_heads_v divides num_heads and may differ from num_heads_k.
        dropout_p: probability in [0, 1) of dropping a score; drawn from torch's default generator.
        softmax_scale: factor of q.k; ``head_dim ** -0.5`` if None.
        causal: no key to the right of the query; sets right = 0.
        window_size: (left, right) in keys, -1 for unbounded; None is (-1, -1).
        softcap: scores become ``softcap * tanh(score / softcap)``; 0 is off. Not with dropout.
        alibi_slopes: float32 [num_heads] or [batch, num_heads]; adds ``-slope * |i + off - j|`` (arXiv 2108.12409).
        deterministic: the same gradient bits on every run. Always so on a CPU; on a GPU it costs some speed and memory.
            `torch.use_deterministic_algorithms(True)` asks for it, too.
        return_attn_probs: also return the LSE and S_dmask.
        keep_first: keys 0 .. keep_first - 1 have no left window bound (StreamingLLM, arXiv 2309.17453).
        force_fa_decode: no left window bound for a sequence of one query.
        full_from: int or int32 [batch]; no left window bound for query rows i >= full_from.
        s_aux, sinks, learnable_sink: [num_heads] learned sinks in natural-log units, in the softmax denominator only.
        seqused_k: int or int32 [batch]: keys used of each sequence.
        out: where to write the result; not with gradients.
        backend: None or "auto" lets Strobe pick; "cpu", "sm80" or "sm90" forces an engine of the tensors' device, and
            raises where it cannot serve the call (default: STROBE_BACKEND as it is at the first call). Gradients on a
            GPU are computed by "sm80" in any case.

    Returns:
        out [batch, seqlen_q, num_heads, head_dim_v], or (out, lse, S_dmask) with lse float32
        [batch, num_heads, seqlen_q], natural log. A row that sees no key gives out 0 and lse +inf. S_dmask is empty
        without dropout, else the probabilities [batch, num_heads, rows, cols], sizes rounded up to 128, negative where
        dropped.

    Raises:
        ValueError, TypeError: an argument is not allowed; nothing was written.

    Method: FlashAttention-2 (arXiv 2307.08691).
    """
    # As _dense does; here too, because one more Python call costs a quarter of a small call's time.
    if sinks is None and learnable_sink is None and not is_dynamo_compiling():
        result = _C.attend(
            q, k, v, s_aux, out, None, None, None, seqused_k, None, None, None, full_from, alibi_slopes,
            "flash_attn_func", -1, -1, softmax_scale, softcap, dropout_p, causal, window_size, keep_first,
            force_fa_decode, deterministic, backend, 0, 0, return_attn_probs,
        )  # fmt: skip
        if result is not NotImplemented:
            return (*result, q.new_empty(0)) if return_attn_probs is True else result
    s_aux = one_of("flash_attn_func", s_aux=s_aux, sinks=sinks, learnable_sink=learnable_sink)
    return _dense(
        "flash_attn_func", q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
        return_attn_probs, keep_first, force_fa_decode, full_from, s_aux, backend, seqused_k, out,
    )  # fmt: skip


def flash_attn_kvpacked_func(
    q, kv, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False, *, keep_first=0, force_fa_decode=False, full_from=None, s_aux=None,
    sinks=None, learnable_sink=None, backend=None,
):  # fmt: skip
    """`flash_attn_func` with k and v in one tensor: kv [batch, seqlen_k, 2, num_heads_k, head_dim]."""
    function = "flash_attn_kvpacked_func"
    if getattr(kv, "ndim", 0) != 5 or kv.shape[2] != 2:
        raise ValueError(f"{function}: kv has shape {_shape(kv)}, it takes [batch, seqlen_k, 2, num_heads_k, head_dim]")
    s_aux = one_of(function, s_aux=s_aux, sinks=sinks, learnable_sink=learnable_sink)
    return _dense(
        function, q, *kv.unbind(2), dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
        return_attn_probs, keep_first, force_fa_decode, full_from, s_aux, backend,
    )  # fmt: skip


def flash_attn_qkvpacked_func(
    qkv, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False, *, keep_first=0, force_fa_decode=False, full_from=None, s_aux=None,
    sinks=None, learnable_sink=None, backend=None,
):  # fmt: skip
    """`flash_attn_func` with q, k and v in one tensor: qkv [batch, seqlen, 3, num_heads, head_dim]."""
    function = "flash_attn_qkvpacked_func"
    if getattr(qkv, "ndim", 0) != 5 or qkv.shape[2] != 3:
        raise ValueError(f"{function}: qkv has shape {_shape(qkv)}, it takes [batch, seqlen, 3, num_heads, head_dim]")
    s_aux = one_of(function, s_aux=s_aux, sinks=sinks, learnable_sink=learnable_sink)
    return _dense(
        function, *qkv.unbind(2), dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
        return_attn_probs, keep_first, force_fa_decode, full_from, s_aux, backend,
    )  # fmt: skip


def _shape(x):
    return list(getattr(x, "shape", ())) or type(x).__name__
