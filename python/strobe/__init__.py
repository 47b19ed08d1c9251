"""Strobe: exact flash attention for any head dimension and any window, forward and backward."""

from strobe._extension import cpu_isa
from strobe.interface import flash_attn_func, flash_attn_kvpacked_func, flash_attn_qkvpacked_func
from strobe.kvcache import flash_attn_with_kvcache
from strobe.varlen import flash_attn_varlen_func, flash_attn_varlen_kvpacked_func, flash_attn_varlen_qkvpacked_func

__version__ = "0.1.0"

__all__ = [
    "cpu_isa",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]
