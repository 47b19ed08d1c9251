"""The seven functions with flash-attention-SWAA's exact positions: keep_first and force_fa_decode after softcap."""

from strobe.compat import fa2
from strobe.compat.order import swaa_order

__all__ = fa2.__all__

flash_attn_func = swaa_order(fa2.flash_attn_func)
flash_attn_kvpacked_func = swaa_order(fa2.flash_attn_kvpacked_func)
flash_attn_qkvpacked_func = swaa_order(fa2.flash_attn_qkvpacked_func)
flash_attn_varlen_func = swaa_order(fa2.flash_attn_varlen_func)
flash_attn_varlen_kvpacked_func = swaa_order(fa2.flash_attn_varlen_kvpacked_func)
flash_attn_varlen_qkvpacked_func = swaa_order(fa2.flash_attn_varlen_qkvpacked_func)
flash_attn_with_kvcache = swaa_order(fa2.flash_attn_with_kvcache)
