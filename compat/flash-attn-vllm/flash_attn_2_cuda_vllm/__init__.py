"""The extension of flash_attn_vllm: as flash_attn_2_cuda, the number of arguments tells them apart."""

from strobe.compat.extension import bwd, fwd, fwd_kvcache, varlen_bwd, varlen_fwd

__all__ = ["bwd", "fwd", "fwd_kvcache", "varlen_bwd", "varlen_fwd"]
