"""Rotary position embedding in the order of FlashAttention's kernel; plain PyTorch, no Triton."""

from strobe.compat.rotary import apply_rotary

__all__ = ["apply_rotary"]
