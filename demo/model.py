"""A small GPT whose attention is one function, given from outside.

An attention function takes q [batch, seqlen, HEADS, DIM], k [.., HEADS_K, DIM], v [.., HEADS_V, DIM_V], the layer's
number, its Mask and the ALiBi slopes. Three are here: Strobe, Strobe with a KV cache, and PyTorch's with a dense mask.
"""

import functools
from typing import NamedTuple

import masks
import text
import torch
import torch.nn.functional as F
from torch import nn

import strobe

WIDTH, LAYERS = 128, 4
HEADS, HEADS_K, HEADS_V, DIM, DIM_V = 4, 2, 4, 32, 64
WINDOW, KEEP = 48, 4
SLOPES = (0.5, 0.125, 0.03125, 0.0)  # a bias of -slope * distance; the last head sees every distance alike


class Mask(NamedTuple):
    """What a layer may see, on top of causal: the window's left bound (-1: none) and what lifts it."""

    window: int = -1
    keep_first: int = 0
    force_fa_decode: bool = False
    full_from: int | None = None

    def options(self) -> dict:
        return {
            "causal": True,
            "window_size": (self.window, 0),
            "keep_first": self.keep_first,
            "force_fa_decode": self.force_fa_decode,
            "full_from": self.full_from,
        }


FULL, WINDOWED = Mask(), Mask(WINDOW, KEEP)
AS_TRAINED = (WINDOWED, FULL) * (LAYERS // 2)  # half the layers window + kept tokens, half full


def strobe_attention(q, k, v, layer, mask, slopes):
    return strobe.flash_attn_func(q, k, v, alibi_slopes=slopes, **mask.options())


def for_sdpa(q, k, v):
    """Every head written out, q and k padded to v's head dim: what SDPA's flash kernel takes."""
    heads = q.shape[2]
    q, k = (F.pad(x, (0, v.shape[-1] - x.shape[-1])) for x in (q, k))
    return tuple(x.repeat_interleave(heads // x.shape[2], 2).transpose(1, 2) for x in (q, k, v))


@functools.lru_cache(maxsize=2)  # a model needs two, for its windowed and its full layers
def dense_bias(n: int, mask: Mask, slopes, dtype, device) -> torch.Tensor:
    """What SDPA adds to the scores [1, heads or 1, n, n]: ALiBi where visible, else -inf."""
    seen = masks.visible(n, n, **mask.options()).to(device)
    bias = torch.zeros(1, n, n, device=device)
    if slopes is not None:
        i, j = torch.arange(n, device=device)[:, None], torch.arange(n, device=device)
        bias = -slopes[:, None, None] * (i - j).abs()
    return bias.masked_fill(~seen, -torch.inf).to(dtype)[None]


def sdpa_attention(q, k, v, layer, mask, slopes):
    """The same by PyTorch, mask and ALiBi as one dense bias."""
    bias, scale = dense_bias(q.shape[1], mask, slopes, q.dtype, q.device), q.shape[-1] ** -0.5
    return F.scaled_dot_product_attention(*for_sdpa(q, k, v), attn_mask=bias, scale=scale).transpose(1, 2)


class KVCache:
    """Attention that appends to a cache first. `length` is what the cache holds; the caller advances it."""

    def __init__(self, batch: int, capacity: int, like: torch.Tensor):
        self.length = 0
        self.layers = [
            (like.new_empty(batch, capacity, HEADS_K, DIM), like.new_empty(batch, capacity, HEADS_V, DIM_V))
            for _ in range(LAYERS)
        ]

    def __call__(self, q, k, v, layer, mask, slopes):
        return strobe.flash_attn_with_kvcache(
            q, *self.layers[layer], k, v, cache_seqlens=self.length, alibi_slopes=slopes, **mask.options()
        )


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.qkv = nn.Linear(WIDTH, HEADS * DIM + HEADS_K * DIM + HEADS_V * DIM_V)
        self.project = nn.Linear(HEADS * DIM_V, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def heads(self, x):
        q, k, v = self.qkv(self.norms[0](x)).split((HEADS * DIM, HEADS_K * DIM, HEADS_V * DIM_V), -1)
        return q.unflatten(-1, (HEADS, DIM)), k.unflatten(-1, (HEADS_K, DIM)), v.unflatten(-1, (HEADS_V, DIM_V))

    def forward(self, x, attend):
        x = x + self.project(attend(*self.heads(x)).flatten(-2))
        return x + self.mlp(self.norms[1](x))


class GPT(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.dtype = dtype  # of q, k and v; the rest is float32
        self.embed = nn.Embedding(text.BYTES, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.register_buffer("slopes", torch.tensor(SLOPES))
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                ends_residual = name.endswith(("project.weight", "mlp.2.weight"))
                nn.init.normal_(weight, std=0.02 if "embed" in name else WIDTH**-0.5 / (4 if ends_residual else 1.5))

    def forward(self, tokens, attention=strobe_attention, layers=AS_TRAINED, last=0):
        """Logits [batch, seqlen, 256], or those of the last `last` positions. `layers`: a Mask for each layer."""
        x = self.embed(tokens)
        for layer, (block, mask) in enumerate(zip(self.blocks, layers, strict=True)):

            def attend(q, k, v, layer=layer, mask=mask):
                q, k, v = (t.to(self.dtype) for t in (q, k, v))
                return attention(q, k, v, layer, mask, self.slopes).to(x.dtype)

            x = block(x, attend)
        return self.norm(x[:, -last:]) @ self.embed.weight.T


def loss_of(model, batch, **options):
    """Mean cross-entropy of the next byte, in nats."""
    return F.cross_entropy(model(batch[:, :-1], **options).flatten(0, 1), batch[:, 1:].flatten())
