"""FlashAttention 3, served by Strobe."""

__version__ = "3.0.0"
