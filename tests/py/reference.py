"""What attention is, in plain PyTorch: the oracle of every test. Written to be read, not to be fast.

A call is described by rows: for each sequence, which rows of the flattened q and of the flattened k/v take part. Dense,
packed, partly used, left-padded and paged calls differ in nothing else. Gradients come from autograd.
"""

import functools
import math
from dataclasses import dataclass, field

import numpy as np
import torch

INF = float("inf")


@dataclass
class Problem:
    """The options of a call and, per sequence, its rows in q.flatten(0, -3) and in k.flatten(0, -3)."""

    q_rows: list
    k_rows: list
    scale: float
    causal: bool = False
    window: tuple = (-1, -1)
    keep_first: int = 0
    force_fa_decode: bool = False
    full_from: list = None  # per sequence
    softcap: float = 0.0
    slopes: torch.Tensor = None  # [h] or [b, h]
    dropout_p: float = 0.0
    keep: list = field(default_factory=list)  # per sequence [h, sq, sk], with dropout


@functools.lru_cache(maxsize=64)  # a comparison asks for the same masks up to six times, and they take nearly all of it
def visible(seqlen_q, seqlen_k, causal=False, window=(-1, -1), keep_first=0, force_fa_decode=False, full_from=None):
    """The dense boolean mask [seqlen_q, seqlen_k], straight from the definition. Nobody may write to it."""
    left, right = (INF if side < 0 else side for side in window)
    if causal:
        right = 0
    if force_fa_decode and seqlen_q == 1:
        left = INF
    mask = torch.zeros(seqlen_q, seqlen_k, dtype=torch.bool)
    off = seqlen_k - seqlen_q
    for i in range(seqlen_q):
        row_left = INF if full_from is not None and i >= full_from else left
        for j in range(seqlen_k):
            in_window = j >= max(0, i + off - row_left)
            mask[i, j] = j < min(seqlen_k, i + off + right + 1) and (in_window or j < keep_first)
    return mask


@dataclass
class Result:
    out: torch.Tensor  # [sq, h, dv]
    lse: torch.Tensor  # [h, sq]
    probs: torch.Tensor  # [h, sq, sk], before dropout


def attend(q, k, v, mask, scale, softcap=0.0, slopes=None, sinks=None, keep=None, dropout_p=0.0):
    """One sequence: q [sq, h, d], k [sk, hk, d], v [sk, hv, dv], everything computed in q's dtype."""
    heads, (seqlen_q, seqlen_k) = q.shape[1], mask.shape
    k = k.repeat_interleave(heads // k.shape[1], 1)
    v = v.repeat_interleave(heads // v.shape[1], 1)
    score = torch.einsum("ihd,jhd->hij", q, k) * scale
    if softcap:
        score = softcap * torch.tanh(score / softcap)
    if slopes is not None:
        i, j = torch.arange(seqlen_q)[:, None], torch.arange(seqlen_k)[None]
        distance = (i + seqlen_k - seqlen_q - j).abs()
        score = score - (slopes.to(score.dtype)[:, None, None] * distance.to(score.dtype))
    score = score.masked_fill(~mask, -INF)
    # One more column: the learned sink, or nothing. A row that sees nothing has 0 there, to keep its softmax finite.
    empty = ~mask.any(1)
    if sinks is None:
        column = torch.where(empty, 0.0, -INF).to(score.dtype).expand(heads, seqlen_q)
    else:
        column = sinks.to(score.dtype)[:, None].expand(heads, seqlen_q)
    score = torch.cat([score, column[..., None]], -1)
    probs = torch.softmax(score, -1)[..., :-1]
    lse = torch.logsumexp(score, -1)
    if sinks is None:
        lse = lse.masked_fill(empty, INF)
    weights = probs if keep is None else probs * keep.to(probs.dtype) / (1 - dropout_p)
    return Result(torch.einsum("hij,jhd->ihd", weights, v), lse, probs)


def mask_of(problem, b):
    return visible(
        len(problem.q_rows[b]),
        len(problem.k_rows[b]),
        problem.causal,
        problem.window,
        problem.keep_first,
        problem.force_fa_decode,
        None if problem.full_from is None else problem.full_from[b],
    )


def slopes_of(problem, b):
    return problem.slopes[b] if problem.slopes is not None and problem.slopes.ndim == 2 else problem.slopes


def attend_sequence(problem, b, q, k, v, sinks):
    """Sequence b of tensors flattened to [rows, heads, dim]."""
    keep = problem.keep[b] if problem.dropout_p else None
    rows_q, rows_k = problem.q_rows[b], problem.k_rows[b]
    options = (problem.scale, problem.softcap, slopes_of(problem, b), sinks, keep, problem.dropout_p)
    return attend(q[rows_q], k[rows_k], v[rows_k], mask_of(problem, b), *options)


def attention(problem, q, k, v, sinks=None):
    """The whole call: out as q but head_dim_v wide, and lse [h, rows of q]. Rows in no sequence: out 0, LSE +inf."""
    flat = [x.flatten(0, -3) for x in (q, k, v)]
    out = flat[0].new_zeros(flat[0].shape[0], q.shape[-2], v.shape[-1])
    lse = out.new_full((q.shape[-2], out.shape[0]), INF)
    for b, rows in enumerate(problem.q_rows):
        result = attend_sequence(problem, b, *flat, sinks)
        out = out.index_put((rows,), result.out)
        lse = lse.index_put((torch.arange(q.shape[-2])[:, None], rows[None]), result.lse)
    return out.reshape(*q.shape[:-1], v.shape[-1]), lse


def shape_lse(lse, q):
    """[h, rows] as the calls return it: [b, h, sq], packed [h, total_q]."""
    return lse if q.ndim == 3 else lse.reshape(q.shape[2], *q.shape[:2]).transpose(0, 1)


def gradient_scales(problem, q, k, v, sinks, dout, dlse):
    """The largest size of dq, dk, dv, dsinks had no two of their terms cancelled: what rounding errors are relative to.

    dS = P * (dP - delta + dlse) may vanish (a row with one key) while each of its terms was rounded at its own size.
    P is exp(score - lse), whose relative error is the absolute one of a score: an ulp of the score's own terms.
    """
    ulps = FLOOR_ULPS[q.dtype] if q.dtype == torch.float32 else torch.inf  # half types lose more elsewhere
    q, k, v, dout = (x.detach().double().flatten(0, -3) for x in (q, k, v, dout))
    sinks = None if sinks is None else sinks.detach().double()
    scales = [0.0] * 4
    for b, (rows_q, rows_k) in enumerate(zip(problem.q_rows, problem.k_rows, strict=True)):
        if not len(rows_q):
            continue
        result = attend_sequence(problem, b, q, k, v, sinks)
        heads = q.shape[1]
        gain = 1 / (1 - problem.dropout_p)
        wide_k = k[rows_k].repeat_interleave(heads // k.shape[1], 1).abs()
        score = torch.einsum("ihd,jhd->hij", q[rows_q].abs(), wide_k) * abs(problem.scale)
        probs = result.probs * (score / ulps).clamp(min=1)
        wide_v = v[rows_k].repeat_interleave(heads // v.shape[1], 1)
        d_probs = torch.einsum("ihd,jhd->hij", dout[rows_q], wide_v).abs() * gain
        delta = torch.einsum("ihd,ihd->hi", dout[rows_q].abs(), result.out.abs())
        if dlse is not None:
            delta = delta + dlse.double().reshape(heads, -1)[:, rows_q].abs()
        d_score = probs * (d_probs + delta[..., None]) * problem.scale
        terms = (
            torch.einsum("hij,jhd->ihd", d_score, wide_k),
            torch.einsum("hij,ihd->jhd", d_score, q[rows_q].abs()) * (heads // k.shape[1]),
            torch.einsum("hij,ihd->jhd", probs, dout[rows_q].abs()) * (gain * heads / v.shape[1]),
            delta.sum(1),
        )
        scales = [max(s, t.max().item() if t.numel() else 0.0) for s, t in zip(scales, terms, strict=True)]
    return scales


def philox4x32(counter, key):
    """Philox4x32-10 on four uint32 arrays and two ints (Salmon et al., SC 2011)."""
    low = np.uint64(0xFFFFFFFF)
    c = [np.asarray(x, dtype=np.uint64) & low for x in counter]
    k0, k1 = key
    for _ in range(10):
        a, b = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [(b >> np.uint64(32)) ^ c[1] ^ np.uint64(k0), b & low, (a >> np.uint64(32)) ^ c[3] ^ np.uint64(k1), a & low]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack(np.broadcast_arrays(*c))


def dropout_keep(seed, offset, dropout_p, batch, heads, seqlen_q, seqlen_k):
    """Which scores of sequence `batch` dropout keeps: bool [heads, seqlen_q, seqlen_k]."""
    head, i, j = np.ix_(np.arange(heads), np.arange(seqlen_q), np.arange(seqlen_k))
    lane = (i % 8) * 4 + (j % 8) // 2
    counter = (j // 16, i // 16, (batch * heads + head) * 32 + lane, offset & 0xFFFFFFFF)
    words = philox4x32(counter, (seed & 0xFFFFFFFF, (seed >> 32) ^ (offset >> 32)))
    word, half = np.broadcast_arrays((j // 8 % 2) * 2 + i // 8 % 2, j % 2)
    shape = (heads, seqlen_q, seqlen_k)
    index = np.broadcast_to(word, shape)[None].astype(np.int64)
    draw = np.take_along_axis(words.reshape(4, *shape), index, 0)[0]
    draw = (draw >> (np.uint64(16) * np.broadcast_to(half, shape).astype(np.uint64))) & np.uint64(0xFFFF)
    threshold = math.floor((np.float32(1) - np.float32(dropout_p)) * np.float32(65536) + np.float32(0.5))
    return torch.from_numpy(draw < np.uint64(threshold))


def rotary(x, cos, sin, positions, interleaved):
    """Turns x [rows, heads, dim] by the table rows `positions` [rows], in x's dtype."""
    cos, sin = cos.to(x.dtype)[positions][:, None], sin.to(x.dtype)[positions][:, None]
    dim = 2 * cos.shape[-1]
    turned, rest = x[..., :dim], x[..., dim:]
    a, b = (turned[..., 0::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1)
    parts = (a * cos - b * sin, a * sin + b * cos)
    turned = torch.stack(parts, -1).flatten(-2) if interleaved else torch.cat(parts, -1)
    return torch.cat([turned, rest], -1)


# A vectorised f32 exp and another order of summation cost a few ulps that PyTorch, on a tiny problem, may not lose;
# half types are rounded once at the end, where one eps is twice the rounding error, as the rule's factor of 2 is.
FLOOR_ULPS = {torch.float32: 8, torch.float16: 1, torch.bfloat16: 1}


def floor_of(dtype, scale):
    return FLOOR_ULPS[dtype] * torch.finfo(dtype).eps * scale


def assert_close(name, actual, truth, budget, factor, floor):
    """max|actual - truth| <= factor * max|budget - truth| + floor, after comparing where inf and NaN are."""
    assert actual.shape == truth.shape, f"{name}: shape {list(actual.shape)}, expected {list(truth.shape)}"
    actual, truth, budget = actual.detach().double(), truth.detach().double(), budget.detach().double()
    assert not actual.isnan().any(), f"{name}: {actual.isnan().sum()} NaN at {actual.isnan().nonzero()[:4].tolist()}"
    infinite = (actual != truth) & (actual.isinf() | truth.isinf())
    assert not infinite.any(), f"{name}: inf where {truth[infinite][:4].tolist()} at {infinite.nonzero()[:4].tolist()}"
    finite = truth.isfinite()
    if not finite.any():
        return
    error = (actual - truth).where(finite, 0).abs()
    allowed = factor * (budget - truth).where(finite & budget.isfinite(), 0).abs().max().item() + floor
    where = np.unravel_index(error.argmax().item(), error.shape)
    assert error.max() <= allowed, (
        f"{name}: error {error.max():.3g} > {allowed:.3g} at {[int(x) for x in where]}: "
        f"{actual[where]:.7g}, truth {truth[where]:.7g}"
    )
