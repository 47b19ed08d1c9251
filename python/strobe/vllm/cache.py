"""vLLM's KV cache: its layouts read as pages [num_blocks, block_size, num_kv_heads, head_size], and writing to it."""

import torch
from torch import Tensor


def pages(kv_cache: Tensor, head_size: int) -> tuple[Tensor, Tensor]:
    """The pages of K and of V, views of a cache of any strides.

    vLLM 0.26 has K and V side by side in [num_blocks, num_kv_heads, block_size, 2 * head_size]; 0.24 has
    [num_blocks, 2, block_size, num_kv_heads, head_size], and still older ones [2, num_blocks, ...].
    """
    if kv_cache.dim() == 4 and kv_cache.shape[3] == 2 * head_size:
        return kv_cache.transpose(1, 2).split(head_size, -1)
    if kv_cache.dim() == 5 and kv_cache.shape[1] == 2:
        return kv_cache.unbind(1)
    if kv_cache.dim() == 5 and kv_cache.shape[0] == 2:
        return kv_cache.unbind(0)
    raise ValueError(
        f"strobe.vllm: a KV cache of shape {list(kv_cache.shape)} for head_size {head_size}; known are "
        "[num_blocks, num_kv_heads, block_size, 2 * head_size] and [num_blocks, 2, block_size, num_kv_heads, head_size]"
    )


def write(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor, layer) -> None:
    """Puts row i of key and value into slot_mapping[i] = block * block_size + row of the pages; -1 is nowhere.

    key and value may have more rows than there are slots: those of a padded batch.
    """
    if key_cache.is_cuda:
        from vllm._custom_ops import reshape_and_cache_flash

        scales = layer._k_scale, layer._v_scale
        reshape_and_cache_flash(key, value, key_cache, value_cache, slot_mapping, "auto", *scales)
        return
    rows = torch.nonzero(slot_mapping >= 0).flatten()
    slots = slot_mapping[rows].long()
    at = (slots // key_cache.shape[1], slots % key_cache.shape[1])
    key_cache[at] = key[rows]
    value_cache[at] = value[rows]
