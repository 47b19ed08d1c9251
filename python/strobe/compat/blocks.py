"""S_dmask as FlashAttention 2 scales it: exp(score - running maximum) over blocks of keys, from the right."""

import torch
from torch import Tensor


def _get_block_size_n(device, head_dim, is_dropout, is_causal) -> int:
    """The width of the blocks of keys that S_dmask's magnitudes refer to."""
    device = torch.device(device)
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)
    if head_dim <= 32:
        return 128
    if head_dim <= 64:
        return 64 if is_dropout else 128
    if head_dim <= 96 or head_dim > 128:
        return 64
    if capability in ((8, 6), (8, 9)):
        return 64 if is_causal and not is_dropout else 32
    return 32 if is_dropout else 64


def unnormalised(probs: Tensor, head_dim: int, causal: bool) -> Tensor:
    """From probabilities [batch, num_heads, rows, cols], negative where dropped.

    With m the running maximum, P * exp(lse - m) is P over the running maximum of |P|.
    """
    width = _get_block_size_n(probs.device, head_dim, True, causal)
    size = probs.abs().float()
    blocks = [block.amax(-1) for block in size.split(width, -1)]
    running = torch.stack(blocks, -1).flip(-1).cummax(-1).values.flip(-1)
    running = running.repeat_interleave(width, -1)[..., : probs.shape[-1]]
    scaled = torch.where(running > 0, size / running, torch.zeros_like(size))
    return torch.copysign(scaled.to(probs.dtype), probs)
