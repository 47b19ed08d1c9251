"""FlashAttention 2, and flash-attention-SWAA by keyword, served by Strobe."""

from pkgutil import extend_path

from flash_attn import flash_attn_interface as flash_attn_interface
from strobe.compat.fa2 import *  # noqa: F403
from strobe.compat.fa2 import __all__ as __all__

# flash_attn.cute, a module of its own distribution, is found too.
__path__ = extend_path(__path__, __name__)  # noqa: F405

__version__ = "2.8.3"
