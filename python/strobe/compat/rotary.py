"""Rotary position embedding (arXiv 2104.09864): flash_attn.layers.rotary in plain PyTorch, computed in float32."""

import torch
from torch import Tensor

__all__ = [
    "RotaryEmbedding",
    "apply_rotary_emb",
    "apply_rotary_emb_func",
    "apply_rotary_emb_kv_",
    "apply_rotary_emb_qkv_",
    "apply_rotary_emb_torch",
    "rotate_half",
]


def rotate_half(x: Tensor, interleaved: bool = False) -> Tensor:
    """(a, b) -> (-b, a), of halves or of neighbours."""
    a, b = _pairs(x, interleaved)
    return _joined(-b, a, interleaved)


def _pairs(x, interleaved):
    return (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)


def _joined(a, b, interleaved):
    return torch.stack((a, b), -1).flatten(-2) if interleaved else torch.cat((a, b), -1)


def apply_rotary_emb_torch(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """x [batch, seqlen, heads, dim] turned by cos and sin [(batch,) seqlen, rotary_dim / 2]."""
    return _turned(x, cos.unsqueeze(-2), sin.unsqueeze(-2), interleaved)


def _turned(x, cos, sin, interleaved):
    width = 2 * cos.shape[-1]
    if width > x.shape[-1]:
        raise ValueError(f"apply_rotary_emb: cos turns {width} entries, x has {x.shape[-1]}")
    a, b = _pairs(x[..., :width].float(), interleaved)
    cos, sin = cos.float(), sin.float()
    turned = _joined(a * cos - b * sin, a * sin + b * cos, interleaved)
    return torch.cat((turned.to(x.dtype), x[..., width:]), -1)


def _positions(x, seqlen_offsets, cu_seqlens) -> Tensor:
    """The position of each row: [seqlen], [batch, seqlen] or, packed, [total]."""
    if cu_seqlens is None:
        rows = torch.arange(x.shape[1], device=x.device)
        return rows + (seqlen_offsets[:, None] if isinstance(seqlen_offsets, Tensor) else seqlen_offsets)
    rows = torch.arange(x.shape[0], device=x.device, dtype=cu_seqlens.dtype)
    sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), rows, right=True).clamp(max=cu_seqlens.shape[0] - 2)
    offsets = seqlen_offsets[sequence] if isinstance(seqlen_offsets, Tensor) else seqlen_offsets
    return rows - cu_seqlens[sequence] + offsets


def apply_rotary_emb(
    x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, inplace: bool = False,
    seqlen_offsets: int | Tensor = 0, cu_seqlens: Tensor | None = None, max_seqlen: int | None = None,
) -> Tensor:  # fmt: skip
    """x turned by its positions, differentiable.

    Args:
        x: [batch, seqlen, heads, dim], or [total, heads, dim] with cu_seqlens.
        cos, sin: [seqlen_rotary, rotary_dim / 2], rotary_dim <= dim.
        interleaved: pairs are (0, 1), (2, 3), ...; False: (0, dim / 2), ...
        inplace: x itself is turned.
        seqlen_offsets: int or [batch]: the position of each sequence's first row.
        cu_seqlens: int32 [batch + 1]; max_seqlen, the longest length, is FlashAttention's to know and not needed.
    """
    if (cu_seqlens is None) != (x.dim() == 4):
        raise ValueError(f"apply_rotary_emb: x is {list(x.shape)}, it takes 4 axes, or 3 with cu_seqlens")
    positions = _positions(x, seqlen_offsets, cu_seqlens)
    turned = _turned(x, cos[positions].unsqueeze(-2), sin[positions].unsqueeze(-2), interleaved)
    return x.copy_(turned) if inplace else turned


apply_rotary_emb_func = apply_rotary_emb


def apply_rotary(
    x: Tensor, cos: Tensor, sin: Tensor, seqlen_offsets: int | Tensor = 0, cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None, interleaved: bool = False, inplace: bool = False, conjugate: bool = False,
) -> Tensor:  # fmt: skip
    """`apply_rotary_emb` in the order of flash_attn.ops.triton.rotary; conjugate turns back."""
    sin = -sin if conjugate else sin
    return apply_rotary_emb(x, cos, sin, interleaved, inplace, seqlen_offsets, cu_seqlens, max_seqlen)


def apply_rotary_emb_qkv_(
    qkv: Tensor, cos: Tensor, sin: Tensor, cos_k: Tensor | None = None, sin_k: Tensor | None = None,
    interleaved: bool = False, seqlen_offsets: int | Tensor = 0, num_heads_q: int | None = None,
) -> Tensor:  # fmt: skip
    """Turns q and k of qkv in place: [batch, seqlen, 3, heads, dim], or [batch, seqlen, heads_q + 2 * heads_k, dim]
    with num_heads_q. cos_k and sin_k are k's tables, if they differ."""
    cos_k, sin_k = cos if cos_k is None else cos_k, sin if sin_k is None else sin_k
    if qkv.dim() == 5:
        q, k = qkv[:, :, 0], qkv[:, :, 1]
    elif num_heads_q is None:
        raise ValueError(f"apply_rotary_emb_qkv_: qkv is {list(qkv.shape)}, which takes num_heads_q")
    else:
        heads_k = (qkv.shape[2] - num_heads_q) // 2
        q, k = qkv[:, :, :num_heads_q], qkv[:, :, num_heads_q : num_heads_q + heads_k]
    apply_rotary_emb(q, cos, sin, interleaved, True, seqlen_offsets)
    apply_rotary_emb(k, cos_k, sin_k, interleaved, True, seqlen_offsets)
    return qkv


def apply_rotary_emb_kv_(
    kv: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, seqlen_offsets: int | Tensor = 0
) -> Tensor:
    """Turns k of kv [batch, seqlen, 2, heads, dim] in place."""
    apply_rotary_emb(kv[:, :, 0], cos, sin, interleaved, True, seqlen_offsets)
    return kv


class RotaryEmbedding(torch.nn.Module):
    """Turns qkv, or q and k of (qkv, kv), in place. scale_base gives the decay of XPos (arXiv 2212.10554)."""

    def __init__(self, dim: int, base=10000.0, interleaved=False, scale_base=None, device=None):
        super().__init__()
        self.dim, self.base, self.interleaved, self.scale_base = dim, float(base), interleaved, scale_base
        even = torch.arange(0, dim, 2, device=device, dtype=torch.float32)
        self.register_buffer("inv_freq", self.base ** (-even / dim), persistent=False)
        scale = None if scale_base is None else (even + 0.4 * dim) / (1.4 * dim)
        self.register_buffer("scale", scale, persistent=False)
        self._seqlen_cached = 0
        self._cos_cached = self._sin_cached = self._cos_k_cached = self._sin_k_cached = None

    def _update_cos_sin_cache(self, seqlen, device=None, dtype=None):
        cached = self._cos_cached
        if cached is not None and seqlen <= self._seqlen_cached and (cached.device, cached.dtype) == (device, dtype):
            return
        self._seqlen_cached = seqlen
        place = torch.arange(seqlen, device=device, dtype=torch.float32)
        angle = torch.outer(place, self.inv_freq.to(device=device, dtype=torch.float32))
        cos, sin = angle.cos(), angle.sin()
        self._cos_k_cached = self._sin_k_cached = None
        if self.scale is not None:
            power = ((place - seqlen // 2) / self.scale_base)[:, None]
            scale = self.scale.to(device=device) ** power
            self._cos_k_cached, self._sin_k_cached = (cos / scale).to(dtype), (sin / scale).to(dtype)
            cos, sin = cos * scale, sin * scale
        self._cos_cached, self._sin_cached = cos.to(dtype), sin.to(dtype)

    def forward(self, qkv, kv=None, seqlen_offset=0, max_seqlen=None, num_heads_q=None):
        """qkv; or (q, kv). With a tensor seqlen_offset, max_seqlen is the length of the table."""
        if max_seqlen is None and isinstance(seqlen_offset, Tensor):
            max_seqlen = qkv.shape[1] + int(seqlen_offset.max())
        longest = qkv.shape[1] + seqlen_offset if max_seqlen is None else max_seqlen
        self._update_cos_sin_cache(longest, device=qkv.device, dtype=qkv.dtype)
        cos, sin, cos_k, sin_k = self._cos_cached, self._sin_cached, self._cos_k_cached, self._sin_k_cached
        options = dict(interleaved=self.interleaved, seqlen_offsets=seqlen_offset)
        if kv is None:
            return apply_rotary_emb_qkv_(qkv, cos, sin, cos_k, sin_k, num_heads_q=num_heads_q, **options)
        q = apply_rotary_emb(qkv, cos, sin, inplace=True, **options)
        kv = apply_rotary_emb_kv_(kv, cos if cos_k is None else cos_k, sin if sin_k is None else sin_k, **options)
        return q, kv
