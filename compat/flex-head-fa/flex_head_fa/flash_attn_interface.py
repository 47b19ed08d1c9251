"""FlexHeadFA's functions and, with FlashAttention 2.6's arguments and eight results, its private ones."""

import flex_head_fa_2_cuda as flash_attn_cuda

from strobe._arguments import last_contiguous as maybe_contiguous
from strobe.compat.blocks import _get_block_size_n
from strobe.compat.fa2 import *  # noqa: F403
from strobe.compat.fa2 import __all__ as _seven
from strobe.compat.flex import (
    _flash_attn_backward,
    _flash_attn_forward,
    _flash_attn_varlen_backward,
    _flash_attn_varlen_forward,
)

__all__ = [
    *_seven,
    "flash_attn_cuda",
    "maybe_contiguous",
    "_flash_attn_backward",
    "_flash_attn_forward",
    "_flash_attn_varlen_backward",
    "_flash_attn_varlen_forward",
    "_get_block_size_n",
]
