"""Continuous batching: the sequences of a step, packed, over Transformers' paged cache."""

import inspect

import torch

from strobe.kvcache import flash_attn_with_kvcache
from strobe.varlen import flash_attn_varlen_func


def paged_attention(module, query, key, value, cache, sliding_window, layer, s_aux, common, kwargs):
    """out [1, rows, heads, head_dim_v]; writes key and value into the cache."""
    if "kwargs" in inspect.signature(cache.update).parameters:
        key, value = cache.update(key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=kwargs)
        key, value = (x.squeeze(0).transpose(0, 1) for x in (key, value))
        block_table, caches = kwargs.get("block_table"), (kwargs.get("k_cache"), kwargs.get("v_cache"))
    else:
        key, value, block_table, caches = _before_5_19(module, key, value, cache, kwargs)
    sliding_window = sliding_window or getattr(module, "sliding_window", None)
    call = common | dict(causal=True, s_aux=s_aux)
    if sliding_window:
        call["window_size"] = (sliding_window - 1, 0)
    elif layer.window is not None:
        call |= dict(window_size=(layer.window - 1, 0), keep_first=layer.keep_first)
        call |= dict(force_fa_decode=layer.force_fa_decode)
    cu_k = kwargs["cu_seq_lens_k"].to(torch.int32)
    if block_table is None:
        q = query.squeeze(0).transpose(0, 1)
        lengths = (kwargs["max_length_q"], kwargs["max_length_k"])
        cu_q = kwargs["cu_seq_lens_q"].to(torch.int32)
        out = flash_attn_varlen_func(q, key, value, cu_q, cu_k.clone(), *lengths, **call)
        return out[None]
    q, key, value = (x.reshape(-1, 1, *x.shape[-2:]) for x in (query[0].transpose(0, 1), key, value))
    lengths = cu_k.diff()[: q.shape[0]] - 1
    out = flash_attn_with_kvcache(q, *caches, key, value, cache_seqlens=lengths, block_table=block_table, **call)
    return out.transpose(0, 1)


def _before_5_19(module, key, value, cache, kwargs):
    """Earlier versions: the layer's share of the arguments is the function's to pick."""
    kind = "sliding_attention" if getattr(module, "sliding_window", None) else "full_attention"
    for new, old in (("cu_seq_lens_k", None), ("max_length_k", "max_seqlen_k"), ("max_length_q", "max_seqlen_q")):
        given = kwargs[old] if kwargs.get(new) is None and old else kwargs[new]
        kwargs[new] = given[kind] if isinstance(given, dict) else given
    block_table = kwargs.get("block_table")
    if block_table is None:
        where = dict(read_index=kwargs["read_index"], write_index=kwargs["write_index"])
        key, value = cache.update(key_states=key, value_states=value, layer_idx=module.layer_idx, **where)
        return key, value, None, None
    group, place = cache.layer_index_to_group_indices[module.layer_idx]
    shape = (-1, cache.block_size, cache.num_key_value_heads, cache.head_dim)
    caches = (cache.key_cache[place].view(shape), cache.value_cache[place].view(shape))
    key, value = (x.squeeze(0).transpose(0, 1) for x in (key, value))
    return key, value, block_table[group], caches
