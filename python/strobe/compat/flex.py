"""FlexHeadFA 0.1 below its public functions: FlashAttention 2.6's private calls and eight results."""

from strobe.compat import extension, raw

# The results of a forward call; FlexHeadFA pads head dims and hands the padded tensors to its backward. Nothing is
# padded here, so they are the tensors given.
_RESULTS = "out q k v out_padded softmax_lse S_dmask rng_state"


def _eight(q, k, v, results):
    out, lse, probs, rng_state = results
    return out, q, k, v, out, lse, probs, rng_state


def _flash_attn_forward(
    q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, return_softmax
):  # fmt: skip
    return _eight(q, k, v, raw.forward(
        "_flash_attn_forward", q, k, v, dropout_p=dropout_p, softmax_scale=softmax_scale, causal=causal,
        window=window_size, softcap=softcap, alibi_slopes=alibi_slopes, return_softmax=return_softmax,
    ))  # fmt: skip


def _flash_attn_varlen_forward(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, return_softmax=False, block_table=None, leftpad_k=None,
    seqused_k=None,
):  # fmt: skip
    return _eight(q, k, v, raw.forward(
        "_flash_attn_varlen_forward", q, k, v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k, dropout_p=dropout_p, softmax_scale=softmax_scale,
        causal=causal, window=window_size, softcap=softcap, alibi_slopes=alibi_slopes, return_softmax=return_softmax,
        page_table=block_table, leftpad_k=leftpad_k, seqused_k=seqused_k,
    ))  # fmt: skip


def _flash_attn_backward(
    dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
    deterministic, rng_state=None,
):  # fmt: skip
    """(dq, dk, dv, softmax_d)"""
    return raw.backward(
        "_flash_attn_backward", dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p=dropout_p,
        softmax_scale=softmax_scale, causal=causal, window=window_size, softcap=softcap, alibi_slopes=alibi_slopes,
        deterministic=deterministic, rng_state=rng_state,
    )  # fmt: skip


def _flash_attn_varlen_backward(
    dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
    softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, rng_state=None,
):  # fmt: skip
    """(dq, dk, dv, softmax_d)"""
    return raw.backward(
        "_flash_attn_varlen_backward", dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k, max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k, dropout_p=dropout_p,
        softmax_scale=softmax_scale, causal=causal, window=window_size, softcap=softcap, alibi_slopes=alibi_slopes,
        deterministic=deterministic, rng_state=rng_state,
    )  # fmt: skip


def fwd(*args):
    """[out, q, k, v, out_padded, lse, S_dmask, rng_state]"""
    return list(_eight(*args[:3], extension.fwd(*args)))


def varlen_fwd(*args):
    """[out, q, k, v, out_padded, lse, S_dmask, rng_state]"""
    return list(_eight(*args[:3], extension.varlen_fwd(*args)))
