"""The functions of flash_attn_interface, under the name that packages look for."""

from flash_attn_interface import *  # noqa: F403
from flash_attn_interface import __all__  # noqa: F401
