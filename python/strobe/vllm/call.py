"""vLLM's call of flash attention, `vllm.vllm_flash_attn.flash_attn_varlen_func`, by Strobe."""

from strobe.compat.tail import with_tail
from strobe.varlen import flash_attn_varlen_func as _varlen

_NAME = "strobe.vllm: flash_attn_varlen_func"


def flash_attn_varlen_func(
    q, k, v, max_seqlen_q, cu_seqlens_q, max_seqlen_k, cu_seqlens_k=None, seqused_k=None, q_v=None, dropout_p=0.0,
    softmax_scale=None, causal=False, window_size=None, softcap=0.0, alibi_slopes=None, deterministic=False,
    return_attn_probs=False, block_table=None, return_softmax_lse=False, out=None, scheduler_metadata=None,
    q_descale=None, k_descale=None, v_descale=None, num_splits=0, output_scale=None, fa_version=2, s_aux=None,
    cp_world_size=1, cp_rank=0, cp_tot_seqused_k=None, mask_mod=None, aux_tensors=None, dynamic_causal=None, *,
    block_sparse_tensors=None, aux_tensor_leading_dims=None, gather_kv_indices=None, gather_kv_valid_length=None,
    keep_first=0, force_fa_decode=False, backend=None,
):  # fmt: skip
    """Attention of packed queries over packed or paged keys, of prefill and decoding sequences in one call.

    Args:
        q: [total_q, num_heads, head_dim]. Rows behind the last sequence belong to nobody (padded CUDA graphs).
        k, v: [total_k, num_heads_k, head_dim] with cu_seqlens_k, or pages [num_pages, page_size, num_heads_k, head_dim]
            of any strides with block_table and seqused_k.
        block_table: int32 [batch, max_pages]; -1 in unused columns.
        window_size: [left, right] or None.
        scheduler_metadata, num_splits, fa_version: wishes about speed, without an effect: Strobe plans by itself.
        q_descale, k_descale, v_descale: factors of fp8 tensors, which Strobe refuses; others have none.
        keep_first, force_fa_decode, backend: Strobe's own; force_fa_decode is decided for each sequence.
        The others are those of `strobe.flash_attn_varlen_func`.

    Returns:
        out, or (out, lse) with return_softmax_lse: lse float32 [num_heads, total_q].
    """
    refused = dict(
        q_v=q_v, output_scale=output_scale, mask_mod=mask_mod, aux_tensors=aux_tensors, dynamic_causal=dynamic_causal,
        block_sparse_tensors=block_sparse_tensors, aux_tensor_leading_dims=aux_tensor_leading_dims,
        gather_kv_indices=gather_kv_indices, gather_kv_valid_length=gather_kv_valid_length,
        cp_tot_seqused_k=cp_tot_seqused_k, cp_world_size=None if cp_world_size == 1 else cp_world_size,
        return_attn_probs=return_attn_probs or None,
    )  # fmt: skip
    if any(value is not None for value in refused.values()):
        raise NotImplementedError(f"{_NAME}: {', '.join(n for n, value in refused.items() if value is not None)}")
    if fa_version not in (2, 3, 4):
        raise ValueError(f"{_NAME}: fa_version is {fa_version!r}, there are 2, 3 and 4")
    if (cu_seqlens_k is None) == (seqused_k is None):
        raise ValueError(f"{_NAME} takes one of cu_seqlens_k and seqused_k")
    if (block_table is None) != (seqused_k is None):
        raise ValueError(f"{_NAME}: block_table and seqused_k are given together: without pages, use cu_seqlens_k")
    arguments = dict(
        q=q, k=k, v=v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k, dropout_p=dropout_p, softmax_scale=softmax_scale, causal=causal,
        window_size=window_size, softcap=softcap, alibi_slopes=alibi_slopes, deterministic=deterministic,
        return_attn_probs=return_softmax_lse, block_table=block_table, keep_first=keep_first,
        force_fa_decode=force_fa_decode, s_aux=s_aux, seqused_k=seqused_k, out=out, backend=backend,
    )  # fmt: skip
    if not q.is_cuda:
        arguments = with_tail(arguments) or arguments
    result = _varlen(**arguments)
    return result[:2] if return_softmax_lse else result
