"""The oracle of tests/py for calls of the drop-ins, dense or packed, and the error rule."""

import itertools

import torch

import reference

F32, BF16 = torch.float32, torch.bfloat16


def visible(rows, sq, sk, causal=False, window=(-1, -1), keep_first=0, force_fa_decode=False, chunk=0, **_):
    """`reference.visible` for the given rows, by tensors; chunk is FlashAttention 3's attention_chunk."""
    left, right = (2**40 if side < 0 else side for side in window)
    right = 0 if causal else right
    left = 2**40 if force_fa_decode and sq == 1 else left
    at = (rows + sk - sq)[:, None]
    j = torch.arange(sk)[None]
    mask = (j <= at + right) & ((j >= at - left) | (j < keep_first))
    if chunk:
        base = torch.div(at, chunk, rounding_mode="floor") * chunk
        mask &= (j >= base) & (j < base + chunk)
    return mask


def sequence(q, k, v, scale=None, softcap=0.0, slopes=None, sinks=None, keep=None, dropout_p=0.0, rows=None, **mask):
    """(out [rows, h, dv], lse [h, rows]) of one sequence; of all rows, or of some."""
    sq, sk = len(q), len(k)
    assert rows is None or slopes is None  # the oracle takes distances from its own row numbers
    rows = torch.arange(sq) if rows is None else rows
    seen = visible(rows, sq, sk, **mask)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    result = reference.attend(q[rows], k, v, seen, scale, softcap, slopes, sinks, keep, dropout_p)
    return result.out, result.lse


def _at(value, b):
    return value[b] if isinstance(value, (list, tuple)) or (torch.is_tensor(value) and value.dim() == 2) else value


def dense(q, k, v, slopes=None, keep=None, **options):
    results = [
        sequence(*x, slopes=_at(slopes, b), keep=None if keep is None else keep[b], **options)
        for b, x in enumerate(zip(q, k, v, strict=True))
    ]
    return torch.stack([r[0] for r in results]), torch.stack([r[1] for r in results])


def packed(q, k, v, lens_q, lens_k, slopes=None, **options):
    parts = zip(q.split(lens_q), k.split(lens_k), v.split(lens_k), strict=True)
    results = [sequence(*x, slopes=_at(slopes, b), **options) for b, x in enumerate(parts)]
    return torch.cat([r[0] for r in results]), torch.cat([r[1] for r in results], 1)


def offsets(lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def lengths(*values):
    return torch.tensor(values, dtype=torch.int32)


def check(actual, compute, q, k, v, what="out"):
    """compute(q, k, v) in float64 is the truth; the error is at most twice that of the same in the tensors' dtype."""
    dtype = torch.float32 if what == "lse" else actual.dtype
    with torch.no_grad():
        truth, budget = (compute(*(x.detach().to(t) for x in (q, k, v))) for t in (torch.float64, dtype))
    finite = truth[truth.isfinite()]
    scale = finite.abs().max().item() if finite.numel() else 0.0
    scale = max(scale, 1.0) if what == "lse" else scale
    reference.assert_close(what, actual, truth, budget, 2, reference.floor_of(dtype, scale))


def check_both(result, compute, q, k, v):
    """out and LSE of a result (out, lse, ...); compute gives both."""
    check(result[0], lambda *x: compute(*x)[0], q, k, v)
    check(result[1], lambda *x: compute(*x)[1], q, k, v, "lse")


def check_gradients(gradients, compute, q, k, v, dout):
    """Gradients of out within 3x of those of plain PyTorch in the same dtype."""
    truths = []
    for dtype in (torch.float64, gradients[0].dtype):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        out = compute(*leaves)[0]
        truths.append(torch.autograd.grad(out, leaves, dout.to(dtype), allow_unused=True))
    for name, actual, truth, budget in zip(("dq", "dk", "dv"), gradients, *truths, strict=True):
        floor = 4 * reference.floor_of(actual.dtype, truth.abs().max().item() + 1.0)
        reference.assert_close(name, actual, truth, budget, 3, floor)


def tensors(batch, sq, sk, heads=4, heads_k=2, d=16, dv=None, heads_v=None, dtype=F32, grad=False):
    """q, k, v for a dense call; batch None for a packed one."""
    lead = () if batch is None else (batch,)
    q = torch.randn(*lead, sq, heads, d, dtype=dtype)
    k = torch.randn(*lead, sk, heads_k, d, dtype=dtype)
    v = torch.randn(*lead, sk, heads_v or heads_k, dv or d, dtype=dtype)
    return [x.requires_grad_(grad) for x in (q, k, v)]
