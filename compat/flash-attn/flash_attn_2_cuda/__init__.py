"""The extension of flash-attn, and of flash-attention-SWAA: the number of arguments tells them apart."""

from strobe.compat.extension import bwd, fwd, fwd_kvcache, varlen_bwd, varlen_fwd

__all__ = ["bwd", "fwd", "fwd_kvcache", "varlen_bwd", "varlen_fwd"]
