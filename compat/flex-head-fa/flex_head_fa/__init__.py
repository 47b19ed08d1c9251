"""FlexHeadFA, served by Strobe."""

from flex_head_fa import flash_attn_interface as flash_attn_interface
from strobe.compat.fa2 import *  # noqa: F403
from strobe.compat.fa2 import __all__ as __all__

__version__ = "0.1.2"
