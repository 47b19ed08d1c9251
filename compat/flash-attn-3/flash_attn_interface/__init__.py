"""FlashAttention 3's functions and those of FlexHeadFA's Hopper module, served by Strobe."""

from strobe.compat.combine import flash_attn_combine
from strobe.compat.f3b2 import flash_attn_f3b2_func, flash_attn_f3b2_varlen_func
from strobe.compat.fa3 import (
    flash_attn_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    get_scheduler_metadata,
)
from strobe.compat.fa3_ops import _flash_attn_backward, _flash_attn_forward

__all__ = [
    "_flash_attn_backward",
    "_flash_attn_forward",
    "flash_attn_combine",
    "flash_attn_f3b2_func",
    "flash_attn_f3b2_varlen_func",
    "flash_attn_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "get_scheduler_metadata",
]
