"""The seven functions with flash-attention-SWAA's exact positions, and its semi-private ones."""

from flash_attn import flash_attn_interface as _interface
from strobe.compat.extension import _varlen_fwd
from strobe.compat.ops import in_swaa_order as _in_swaa_order
from strobe.compat.swaa import *  # noqa: F403
from strobe.compat.swaa import __all__ as _seven

_ops = _in_swaa_order(_interface._ops)
_flash_attn_forward = _ops._flash_attn_forward
_flash_attn_varlen_forward = _ops._flash_attn_varlen_forward
_flash_attn_backward = _ops._flash_attn_backward
_flash_attn_varlen_backward = _ops._flash_attn_varlen_backward

__all__ = [
    "_flash_attn_backward",
    "_flash_attn_forward",
    "_flash_attn_varlen_backward",
    "_flash_attn_varlen_forward",
    "_varlen_fwd",
    *_seven,
]
