"""The extension of FlexHeadFA: FlashAttention 2.6's, whose forward calls have eight results."""

from strobe.compat.extension import bwd, fwd_kvcache, varlen_bwd
from strobe.compat.flex import fwd, varlen_fwd

__all__ = ["bwd", "fwd", "fwd_kvcache", "varlen_bwd", "varlen_fwd"]
