"""What Strobe looks at: with the identity matrix as v, the output of attention is its weights.

head_dim_v is then the sequence length, rounded up to what GPU engines take, a multiple of 8.
"""

import masks
import torch
from model import AS_TRAINED, HEADS, LAYERS, Mask, strobe_attention

import strobe


def weights(q, k, mask: Mask, slopes=None) -> torch.Tensor:
    """Attention weights [heads, seqlen_q, seqlen_k] of one sequence, from Strobe itself."""
    n = k.shape[1]
    identity = torch.eye(n, -(-n // 8) * 8, dtype=k.dtype, device=k.device)[None, :, None]
    out = strobe.flash_attn_func(q, k, identity, alibi_slopes=slopes, **mask.options())
    return out[0, ..., :n].transpose(0, 1).cpu()


def agrees(seqlen_q: int, seqlen_k: int, mask: Mask, where) -> bool:
    """Whether Strobe sees exactly the keys that the picture of the mask shows."""
    q, k = (torch.zeros(1, n, 1, 32, dtype=where.dtype, device=where.name) for n in (seqlen_q, seqlen_k))
    pictured = [[kind != "empty" for kind in row] for row in masks.kinds(seqlen_q, seqlen_k, **mask.options())]
    return torch.equal(weights(q, k, mask)[0] > 0, torch.tensor(pictured))


@torch.no_grad()
def heads(model, tokens) -> list[torch.Tensor]:
    """For each layer the weights [HEADS, n, n] of all heads over one text [n]."""
    seen = [None] * LAYERS

    def attention(q, k, v, layer, mask, slopes):
        seen[layer] = weights(q, k, mask, slopes)
        return strobe_attention(q, k, v, layer, mask, slopes)

    model(tokens[None], attention=attention, layers=AS_TRAINED)
    assert all(w.shape[0] == HEADS for w in seen)
    return seen
