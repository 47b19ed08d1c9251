"""The backend CUSTOM of vLLM's v1 engine: what it supports, the layout of its cache, and the metadata of a batch."""

import copy
from dataclasses import dataclass

import torch
from vllm.config import CUDAGraphMode
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    MultipleOf,
)

from strobe.vllm import settings
from strobe.vllm.attention import StrobeImpl


class StrobeBackend(AttentionBackend):
    supported_dtypes = [torch.float16, torch.bfloat16]
    supported_kv_cache_dtypes = ["auto", "float16", "bfloat16"]
    forward_includes_kv_cache_update = False

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"  # the name of the member of vLLM's enumeration that out-of-tree backends have

    @staticmethod
    def get_impl_cls():
        return StrobeImpl

    @staticmethod
    def get_builder_cls():
        return StrobeMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec=None):
        # Any page size would do; vLLM's own writing of the cache and its connectors count in 16s.
        return [MultipleOf(16)]

    @staticmethod
    def get_kv_cache_shape(num_blocks, block_size, num_kv_heads, head_size, cache_dtype_str="auto"):
        return _layout().get_kv_cache_shape(num_blocks, block_size, num_kv_heads, head_size, cache_dtype_str)

    @staticmethod
    def get_kv_cache_stride_order(include_num_layers_dimension=False):
        return _layout().get_kv_cache_stride_order(include_num_layers_dimension)

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return head_size >= 8 and head_size % 8 == 0

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_compute_capability(cls, capability) -> bool:
        return capability.major >= 8

    @classmethod
    def supports_combination(
        cls, head_size, dtype, kv_cache_dtype, block_size, use_mla, has_sink, use_sparse, use_mm_prefix,
        device_capability,
    ) -> str | None:  # fmt: skip
        if kv_cache_dtype in ("float16", "bfloat16") and getattr(torch, kv_cache_dtype) != dtype:
            return f"a KV cache of {kv_cache_dtype} for a model of {dtype}"
        return None


def _layout():
    """Whose cache layout is ours: that of vLLM's Triton backend, which needs no library of its own.

    Versions differ in it, and what moves cache blocks around knows that of its version. Versions that lay the cache out
    themselves do not ask a backend.
    """
    from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend

    return TritonAttentionBackend


@dataclass
class StrobeMetadata(AttentionMetadata):
    num_actual_tokens: int  # rows of the batch; with a full CUDA graph, those of its padded batch
    max_query_len: int
    query_start_loc: torch.Tensor  # int32 [num_reqs + 1]
    max_seq_len: int
    seq_lens: torch.Tensor  # int32 [num_reqs]
    block_table: torch.Tensor  # int32 [num_reqs, max_blocks]
    slot_mapping: torch.Tensor  # int64 [num_actual_tokens]


class StrobeMetadataBuilder(AttentionMetadataBuilder):
    # What varies between replays is read from tensors on the device, whether a sequence decodes among it.
    _cudagraph_support = AttentionCGSupport.ALWAYS
    supports_update_block_table = True

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        parallel = vllm_config.parallel_config
        if parallel.decode_context_parallel_size > 1:
            raise NotImplementedError("strobe.vllm: decode_context_parallel_size")
        if getattr(vllm_config.model_config, "rswa_window", None) is not None:
            raise NotImplementedError("strobe.vllm: a model with a reference sliding window (rswa_window)")
        layers = settings.of_engine(vllm_config)
        if layers is not None and vllm_config.speculative_config is not None:
            # A draft's queries are several rows, which force_fa_decode does not take for decoding.
            raise NotImplementedError("strobe.vllm: settings of a window together with speculative decoding")

    def build(self, common_prefix_len, common_attn_metadata, fast_build=False) -> StrobeMetadata:
        if common_prefix_len > 0:
            raise ValueError("strobe.vllm: cascade attention, which use_cascade_attention() has declined")
        common = common_attn_metadata
        if common.causal is not True:
            raise NotImplementedError("strobe.vllm: a batch of non-causal attention")
        if getattr(common, "mm_req_doc_ranges", None) is not None:
            raise NotImplementedError("strobe.vllm: bidirectional attention of multimodal tokens (mm_req_doc_ranges)")
        return StrobeMetadata(
            num_actual_tokens=common.num_actual_tokens,
            max_query_len=common.max_query_len,
            query_start_loc=common.query_start_loc,
            max_seq_len=common.max_seq_len,
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor,
            slot_mapping=common.slot_mapping,
        )

    def build_for_cudagraph_capture(self, common_attn_metadata) -> StrobeMetadata:
        """The maxima become part of the graph, so they have to hold for every batch that it will be replayed with."""
        metadata = self.build(0, common_attn_metadata)
        metadata.max_seq_len = max(metadata.max_seq_len, self.vllm_config.model_config.max_model_len)
        if self.vllm_config.compilation_config.cudagraph_mode.mixed_mode() == CUDAGraphMode.FULL:
            # One graph for prefill and decode: captured with a row per sequence, replayed with a sequence of all rows.
            metadata.max_query_len = metadata.num_actual_tokens
        return metadata

    def update_block_table(self, metadata, blk_table, slot_mapping) -> StrobeMetadata:
        updated = copy.copy(metadata)
        updated.block_table, updated.slot_mapping = blk_table, slot_mapping
        return updated

    def use_cascade_attention(self, *args, **kwargs) -> bool:
        # It attends to the common prefix in a call of its own, which would miss the window and the kept tokens.
        return False
