def reshape_and_cache_flash(key, value, key_cache, value_cache, slot_mapping, kv_cache_dtype, k_scale, v_scale):
    """Of the GPU operator: slots are told by the length of slot_mapping, -1 is nowhere, strides are any."""
    assert kv_cache_dtype == "auto"
    rows = slot_mapping.shape[0]
    block_size = key_cache.shape[1]
    # Without a synchronisation, as in a CUDA graph: rows of slot -1 write again what is there.
    safe = slot_mapping.clamp(min=0)
    at = (safe // block_size, safe % block_size)
    used = (slot_mapping >= 0)[:, None, None]
    key_cache[at] = key[:rows].where(used, key_cache[at])
    value_cache[at] = value[:rows].where(used, value_cache[at])
