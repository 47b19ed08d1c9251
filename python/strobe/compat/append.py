"""New keys and values into a cache, by tensor operations alone: no copy from the device, so graphs can capture it."""

import torch
from torch import Tensor

from strobe.compat.rotary import _turned


def append(function: str, caches, new, seqlens: Tensor, cu_seqlens_new, page_table, cache_batch_idx, tables) -> Tensor:
    """Writes new = (k, v) behind the `seqlens` keys of each sequence; returns the lengths with them.

    Args:
        caches: (k, v) [batch_cache, capacity, heads, dim], or pages [num_pages, page_size, heads, dim].
        new: (k, v) [batch, seqlen_new, heads, dim], or [total_new, heads, dim] with cu_seqlens_new.
        tables: None, or (cos, sin, position of each sequence's first new key, interleaved).
    """
    sequence, row, added = _places(new[0], cu_seqlens_new, seqlens)
    k, v = (x if x.dim() == 3 else x.flatten(0, 1) for x in new)
    if cu_seqlens_new is not None and not k.is_cuda:  # rows behind the last sequence belong to none
        total = int(cu_seqlens_new[-1])
        sequence, row, k, v = sequence[:total], row[:total], k[:total], v[:total]
    position = seqlens[sequence] + row
    if page_table is None:
        first = sequence if cache_batch_idx is None else cache_batch_idx[sequence].long()
        second, capacity = position, caches[0].shape[1]
    else:
        table = page_table if cache_batch_idx is None else page_table[cache_batch_idx]
        size = caches[0].shape[1]
        capacity = table.shape[1] * size
        column = torch.div(position, size, rounding_mode="floor")
        if not position.is_cuda:
            _check(function, position, capacity)
        first, second = table[sequence, column].long(), position % size
    if not position.is_cuda:
        _check(function, position, capacity)
        if first.numel() and (first.min() < 0 or first.max() >= caches[0].shape[0]):
            raise ValueError(f"{function}: a new key's row or page is not in the cache of {caches[0].shape[0]}")
    if tables is not None:
        cos, sin, base, interleaved = tables
        at = (base[sequence] + row).long()
        k = _turned(k, cos[at].unsqueeze(-2), sin[at].unsqueeze(-2), interleaved)
    for cache, rows in zip(caches, (k, v), strict=True):
        cache.index_put_((first, second.long()), rows)
    return seqlens + added


def _check(function, position, capacity):
    if position.numel() and int(position.max()) >= capacity:
        raise ValueError(f"{function}: the cache holds {capacity} keys, the new ones end at {int(position.max()) + 1}")


def _places(x, cu_seqlens, seqlens):
    """(sequence, row in it) of each row, and rows per sequence."""
    if cu_seqlens is None:
        batch, rows = x.shape[:2]
        sequence = torch.arange(batch, device=x.device).repeat_interleave(rows)
        return sequence, torch.arange(rows, device=x.device).repeat(batch), torch.full_like(seqlens, rows)
    place = torch.arange(x.shape[0], device=x.device, dtype=cu_seqlens.dtype)
    sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), place, right=True).clamp(max=seqlens.shape[0] - 1)
    return sequence, place - cu_seqlens[sequence], cu_seqlens.diff()


def turn_queries(q: Tensor, cu_seqlens_q, ordered: bool, tables) -> Tensor:
    """q turned by its place in the cache; all rows by their sequence's first place if no mask orders them."""
    cos, sin, base, interleaved = tables
    sequence, row, _ = _places(q, cu_seqlens_q, base)
    at = (base[sequence] + (row if ordered else 0)).long()
    rows = q if q.dim() == 3 else q.flatten(0, 1)
    return _turned(rows, cos[at].unsqueeze(-2), sin[at].unsqueeze(-2), interleaved).reshape(q.shape)
