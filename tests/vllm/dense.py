"""The oracle: attention of one sequence in float64, its mask written out."""

import torch


def visible(rows: int, keys: int, window=None, keep_first=0, force_fa_decode=False) -> torch.Tensor:
    """[rows, keys]; window counts the keys seen, the query's own included; the last row is the last key's."""
    i = torch.arange(keys - rows, keys)[:, None]
    j = torch.arange(keys)[None]
    if window is None or (force_fa_decode and rows == 1):
        return j <= i
    return (j <= i) & ((i - j < window) | (j < keep_first))


def attend(q, k, v, scale, softcap=0.0, alibi_slopes=None, sinks=None, **mask):
    """q [rows, heads, dim], k and v [keys, heads_k, dim]: out [rows, heads, dim] and lse [heads, rows] in float64."""
    seen = visible(q.shape[0], k.shape[0], **mask).to(q.device)
    q, k, v = (x.double().transpose(0, 1) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[0] // k.shape[0], 0) for x in (k, v))
    scores = q @ k.transpose(1, 2) * scale
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    if alibi_slopes is not None:
        i = torch.arange(k.shape[1] - q.shape[1], k.shape[1], device=q.device)[:, None]
        distance = (i - torch.arange(k.shape[1], device=q.device)[None]).abs()
        scores = scores - alibi_slopes.double()[:, None, None] * distance
    scores = scores.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.double()[:, None, None].expand(*scores.shape[:2], 1)], -1)
    out = scores.softmax(-1)[..., : k.shape[1]] @ v
    return out.transpose(0, 1), scores.logsumexp(-1)


def check(out, expected):
    """float32 to rounding; 16-bit within what rounding P and the result can do."""
    tolerance = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}[out.dtype]
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)
