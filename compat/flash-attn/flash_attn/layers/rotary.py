"""Rotary position embedding."""

from strobe.compat.rotary import *  # noqa: F403
from strobe.compat.rotary import __all__ as __all__
