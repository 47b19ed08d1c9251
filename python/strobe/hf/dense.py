"""The dense route: attention under a mask of any pattern, in plain torch."""

import torch
import torch.nn.functional as F


def dense_attention(query, key, value, mask, *, scale, softcap=None, s_aux=None, dropout=0.0):
    """[batch, rows, heads, head_dim_v] of [batch, heads, rows, dim] tensors, under a 4-D mask: boolean, or added."""
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"strobe.hf: a 4-D attention mask of {mask.dtype}; it is boolean, or floating and added")
    mask = mask[..., : key.shape[2]]
    heads = query.shape[1]
    key, value = (x.repeat_interleave(heads // x.shape[1], 1) for x in (key, value))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if not softcap and s_aux is None:
        if mask.is_floating_point():
            mask = mask.to(query.dtype)
        out = F.scaled_dot_product_attention(query, key, value, mask, dropout, scale=scale)
        return out.transpose(1, 2).contiguous()
    scores = (query.float() * scale) @ key.float().mT
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, torch.finfo(torch.float32).min) if mask.dtype == torch.bool else scores + mask
    if s_aux is not None:
        sinks = s_aux.float().view(1, heads, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], -1)
    weights = torch.softmax(scores, -1)[..., : key.shape[2]]
    weights = F.dropout(weights, dropout) if dropout else weights
    return (weights.to(value.dtype) @ value).transpose(1, 2).contiguous()
