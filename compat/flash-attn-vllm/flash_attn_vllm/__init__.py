"""flash-attention-SWAA's folder for vLLM, served by Strobe."""

from flash_attn_vllm import flash_attn_interface as flash_attn_interface
from strobe.compat.swaa import *  # noqa: F403
from strobe.compat.swaa import __all__ as __all__

__version__ = "2.8.3"
