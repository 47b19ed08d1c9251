"""One attention layer of vLLM: writes its keys and values to the cache, and attends over the batch in one call."""

import torch
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backend import AttentionImpl, AttentionType

from strobe.vllm import cache, settings
from strobe.vllm.call import flash_attn_varlen_func


class StrobeImpl(AttentionImpl):
    can_return_lse_for_decode = False
    supports_dcp = False

    def __init__(
        self, num_heads, head_size, scale, num_kv_heads=None, alibi_slopes=None, sliding_window=None,
        kv_cache_dtype="auto", logits_soft_cap=None, attn_type=AttentionType.DECODER, kv_sharing_target_layer_name=None,
        sinks=None,
    ):  # fmt: skip
        if attn_type != AttentionType.DECODER:
            raise NotImplementedError(f"strobe.vllm: attention of type {attn_type}")
        if kv_cache_dtype not in ("auto", "float16", "bfloat16"):
            raise NotImplementedError(f"strobe.vllm: a KV cache of {kv_cache_dtype}")
        if sinks is not None and sinks.shape != (num_heads,):
            raise ValueError(f"strobe.vllm: sinks has shape {list(sinks.shape)}, it takes [{num_heads}]")
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.alibi_slopes = None if alibi_slopes is None else torch.tensor(alibi_slopes, dtype=torch.float32)
        self.sliding_window = sliding_window
        self.kv_cache_dtype = kv_cache_dtype
        self.logits_soft_cap = logits_soft_cap or 0.0
        self.attn_type = attn_type
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self.sinks = sinks
        self._layers = settings.of_engine(get_current_vllm_config())
        self._mask = None  # keyword arguments of the call, known when the first one says which layer this is

    def forward(
        self, layer, query, key, value, kv_cache, attn_metadata, output, output_scale=None, output_block_scale=None
    ):
        """query, output: [num_tokens, num_heads, head_size]. key and value are in the cache already."""
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("strobe.vllm: quantisation of the output (output_scale)")
        if self._mask is None:
            if value is not None and value.shape[-1] != self.head_size:
                # The layouts of the cache that a backend is asked for know one head_size.
                raise NotImplementedError(f"strobe.vllm: head_size {self.head_size} of K, {value.shape[-1]} of V")
            self._mask = self._mask_of(layer)
        if attn_metadata is None:  # vLLM measures its memory: there is no cache yet
            return output.fill_(0)
        rows = attn_metadata.num_actual_tokens
        key_cache, value_cache = cache.pages(kv_cache, self.head_size)
        flash_attn_varlen_func(
            q=query[:rows],
            k=key_cache,
            v=value_cache,
            out=output[:rows],
            cu_seqlens_q=attn_metadata.query_start_loc,
            max_seqlen_q=attn_metadata.max_query_len,
            seqused_k=attn_metadata.seq_lens,
            max_seqlen_k=attn_metadata.max_seq_len,
            softmax_scale=self.scale,
            causal=True,
            alibi_slopes=self.alibi_slopes,
            block_table=attn_metadata.block_table,
            softcap=self.logits_soft_cap,
            s_aux=self.sinks,
            **self._mask,
        )
        return output

    def do_kv_cache_update(self, layer, key, value, kv_cache, slot_mapping) -> None:
        cache.write(key, value, *cache.pages(kv_cache, self.head_size), slot_mapping, layer)

    def _mask_of(self, layer) -> dict:
        chosen = settings.NOTHING
        if self._layers is not None:
            chosen = self._layers[settings.layer_number(layer.layer_name)]
        if chosen.window is None:
            own = -1 if self.sliding_window is None else self.sliding_window - 1
            return dict(window_size=[own, 0 if own >= 0 else -1])
        if self.sliding_window is not None:
            # Its cache is a SlidingWindowSpec, whose blocks behind the model's window are given to other sequences.
            raise ValueError(
                f"strobe.vllm: {layer.layer_name} has a sliding window of the model ({self.sliding_window}); name it "
                'in full_layers, or take the model\'s window away by hf_overrides, such as {"sliding_window": None}'
            )
        return dict(
            window_size=[chosen.window - 1, 0], keep_first=chosen.keep_first, force_fa_decode=chosen.force_fa_decode
        )
