"""One attention from attentions over parts of the keys."""

import torch
from torch import Tensor

from strobe.compat.arguments import INF


def flash_attn_combine(out_partial: Tensor, lse_partial: Tensor, out: Tensor | None = None, out_dtype=None):
    """(out [batch, seqlen, heads, dim], lse [batch, seqlen, heads]).

    Args:
        out_partial: float32 [splits, batch, seqlen, heads, dim].
        lse_partial: float32 [splits, batch, seqlen, heads]; -inf (or +inf) for a part in which a row sees nothing.
        out: where to write. out_dtype: float32 if None.
    """
    if out_partial.dim() != 5 or lse_partial.shape != out_partial.shape[:-1]:
        raise ValueError(
            f"flash_attn_combine: out_partial is {list(out_partial.shape)} and lse_partial {list(lse_partial.shape)}, "
            "they take [splits, batch, seqlen, heads, dim] and [splits, batch, seqlen, heads]"
        )
    if out_partial.dtype != torch.float32 or lse_partial.dtype != torch.float32:
        raise TypeError(f"flash_attn_combine: {out_partial.dtype}, {lse_partial.dtype}, it takes float32")
    lse_partial = lse_partial.masked_fill(lse_partial == INF, -INF)
    lse = lse_partial.logsumexp(0)
    weights = (lse_partial - lse.masked_fill(lse == -INF, 0)).exp()[..., None]
    # A part without weight may hold anything.
    result = torch.where(weights > 0, weights * out_partial, 0).sum(0).to(out_dtype or torch.float32)
    lse = lse.transpose(1, 2).contiguous().transpose(1, 2)  # seqlen is the fastest axis, as FlashAttention's
    if out is not None:
        if out_dtype is not None and out.dtype != out_dtype:
            raise TypeError(f"flash_attn_combine: out is {out.dtype}, out_dtype {out_dtype}")
        result = out.copy_(result)
    return result, lse
