"""FlashAttention 2's functions and, as custom ops of torch.ops.flash_attn, its semi-private ones."""

import flash_attn_2_cuda as flash_attn_gpu

from strobe._arguments import last_contiguous as maybe_contiguous
from strobe.compat import ops
from strobe.compat.blocks import _get_block_size_n
from strobe.compat.extension import _varlen_fwd
from strobe.compat.fa2 import *  # noqa: F403
from strobe.compat.fa2 import __all__ as _seven
from strobe.compat.names import round_multiple

USE_TRITON_ROCM = False

_ops = ops.define("flash_attn")
_flash_attn_forward = _ops._flash_attn_forward
_flash_attn_varlen_forward = _ops._flash_attn_varlen_forward
_flash_attn_backward = _ops._flash_attn_backward
_flash_attn_varlen_backward = _ops._flash_attn_varlen_backward
_wrapped_flash_attn_forward = _ops._wrapped_flash_attn_forward
_wrapped_flash_attn_varlen_forward = _ops._wrapped_flash_attn_varlen_forward
_wrapped_flash_attn_backward = _ops._wrapped_flash_attn_backward
_wrapped_flash_attn_varlen_backward = _ops._wrapped_flash_attn_varlen_backward

__all__ = [
    *_seven,
    "USE_TRITON_ROCM",
    "flash_attn_gpu",
    "maybe_contiguous",
    "round_multiple",
    "_flash_attn_backward",
    "_flash_attn_forward",
    "_flash_attn_varlen_backward",
    "_flash_attn_varlen_forward",
    "_get_block_size_n",
    "_varlen_fwd",
    "_wrapped_flash_attn_backward",
    "_wrapped_flash_attn_forward",
    "_wrapped_flash_attn_varlen_backward",
    "_wrapped_flash_attn_varlen_forward",
]
