"""Any call of FlashAttention 3 as one of Strobe's: which layout it has, what is appended, what q sees."""

import torch
from torch import Tensor

import strobe
from strobe.compat import fa2
from strobe.compat.append import append, turn_queries
from strobe.compat.arguments import lse_of_fa3
from strobe.compat.chunk import in_chunks


def attend(
    function: str, q, k, v, *, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None,
    max_seqlen_q=None, max_seqlen_k=None, page_table=None, cache_batch_idx=None, leftpad_k=None, softmax_scale=None,
    causal=False, window_size=(-1, -1), attention_chunk=0, softcap=0.0, **extra,
):  # fmt: skip
    """(out, lse), differentiable. `extra` are Strobe's keywords."""
    if qv is not None:
        q, k = _absorb(function, q, k, v, qv)
    options = dict(softmax_scale=softmax_scale, causal=causal, window_size=window_size, softcap=softcap, **extra)
    lengths = (cu_seqlens_q, seqused_q, cu_seqlens_k, leftpad_k, page_table, cache_batch_idx)
    if q.dim() == 4 and all(x is None for x in lengths) and not attention_chunk:
        out, lse, _ = strobe.flash_attn_func(q, k, v, seqused_k=seqused_k, return_attn_probs=True, **options)
        return out, lse_of_fa3(lse)
    shape = q.shape
    if q.dim() == 4:
        cu_seqlens_q, max_seqlen_q, q = _offsets(q), q.shape[1], q.flatten(0, 1)
    if max_seqlen_q is None:
        raise ValueError(f"{function}: cu_seqlens_q is given but max_seqlen_q is not")
    if page_table is not None:
        page_table = page_table if cache_batch_idx is None else page_table[cache_batch_idx]
        capacity = page_table.shape[1] * k.shape[1]
    elif k.dim() == 4:
        capacity, rows = k.shape[1], cache_batch_idx
        if rows is not None and k.is_cuda and capacity % 8:  # no page size of the GPU engines
            k, v, rows = k[rows.long()], v[rows.long()], None
        if rows is None:
            batch = cu_seqlens_q.shape[0] - 1
            cu_seqlens_k, k, v = _offsets(k[:batch]), k[:batch].flatten(0, 1), v[:batch].flatten(0, 1)
        else:  # a row of a dense cache is one page
            page_table = rows[:, None]
            seqused_k = torch.full_like(rows, capacity) if seqused_k is None else seqused_k
    else:
        capacity = max_seqlen_k
        if capacity is None or cu_seqlens_k is None:
            raise ValueError(f"{function}: packed k takes cu_seqlens_k and max_seqlen_k")
    if page_table is not None and seqused_k is not None:
        cu_seqlens_k = None
    packed = dict(
        cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q, max_seqlen_k=capacity, seqused_q=seqused_q, seqused_k=seqused_k,
        leftpad_k=leftpad_k, page_table=page_table,
    )  # fmt: skip
    if attention_chunk:
        packed, k, v, options = in_chunks(function, attention_chunk, q, k, v, packed, options)
    out, lse, _ = fa2.flash_attn_varlen_func(q, k, v, return_attn_probs=True, **packed, **options)
    lse = lse_of_fa3(lse)
    if len(shape) == 4:
        out, lse = out.unflatten(0, shape[:2]), lse.unflatten(1, shape[:2]).transpose(0, 1)
    return out, lse


def _offsets(x: Tensor) -> Tensor:
    return torch.arange(x.shape[0] + 1, dtype=torch.int32, device=x.device) * x.shape[1]


def _absorb(function, q, k, v, qv):
    """q.k + qv.v is one product of longer vectors: (q, qv).(k, v). Copies k and v."""
    if k.shape[-2] != v.shape[-2] or qv.shape != (*q.shape[:-1], v.shape[-1]):
        raise ValueError(
            f"{function}: qv is {list(qv.shape)}, allowed is {[*q.shape[:-1], v.shape[-1]]} with as many heads of v "
            f"({v.shape[-2]}) as of k ({k.shape[-2]})"
        )
    return torch.cat((q, qv), -1), torch.cat((k, v), -1)


def attend_with_cache(
    function: str, q, k_cache, v_cache, k=None, v=None, *, cache_seqlens=None, cu_seqlens_k_new=None,
    rotary_cos=None, rotary_sin=None, rotary_seqlens=None, rotary_interleaved=True, **call,
):  # fmt: skip
    """(out, lse) after appending k and v to the caches in place."""
    table, rows = call.get("page_table"), call.get("cache_batch_idx")
    packed = call.get("cu_seqlens_q") is not None
    batch = call["cu_seqlens_q"].shape[0] - 1 if packed else q.shape[0]
    capacity = k_cache.shape[1] if table is None else table.shape[1] * k_cache.shape[1]
    if (k is None) != (v is None) or (k is not None and cache_seqlens is None):
        raise ValueError(f"{function}: k, v and cache_seqlens go together")
    if rotary_cos is not None and k is None:
        raise ValueError(f"{function}: rotary_cos is given but k is not, allowed is both")
    if not isinstance(cache_seqlens, Tensor):
        used = capacity if cache_seqlens is None else cache_seqlens
        cache_seqlens = torch.full((batch,), used, dtype=torch.int32, device=q.device)
    if k is not None:
        base = cache_seqlens if rotary_seqlens is None else rotary_seqlens
        tables = None if rotary_cos is None else (rotary_cos, rotary_sin, base, rotary_interleaved)
        cache_seqlens = append(
            function, (k_cache, v_cache), (k, v), cache_seqlens, cu_seqlens_k_new, table, rows, tables
        )
        if tables is not None:
            window = call.get("window_size")
            ordered = call["causal"] or tuple(window or (-1, -1)) != (-1, -1) or call.get("attention_chunk", 0) > 0
            q = turn_queries(q, call.get("cu_seqlens_q"), ordered, tables)
    if table is None and rows is None and not packed:
        k_cache, v_cache = k_cache[:batch], v_cache[:batch]
    return attend(function, q, k_cache, v_cache, seqused_k=cache_seqlens, **call)
