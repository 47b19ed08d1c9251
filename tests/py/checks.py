"""The error rule applied to whole calls: forward within 2x, gradients within 3x of plain PyTorch in the same dtype.

Both errors are against float64. The LSE is f32 whatever the dtype, so its budget is plain PyTorch in f32.
"""

import torch

import reference
from cases import run


def copies(inputs, dtype):
    """q, k, v, sinks as leaves of one dtype."""
    tensors = [inputs.q, inputs.k, inputs.v, inputs.sinks]
    return [None if t is None else t.detach().to(dtype).requires_grad_() for t in tensors]


def oracle(inputs, dtype):
    q, k, v, sinks = copies(inputs, dtype)
    with torch.no_grad():
        out, lse = reference.attention(inputs.problem, q, k, v, sinks)
    return out, reference.shape_lse(lse, q)


def oracle_gradients(inputs, dtype, with_lse):
    leaves = copies(inputs, dtype)
    out, lse = reference.attention(inputs.problem, *leaves)
    lse = reference.shape_lse(lse, inputs.q)
    loss = dot(out, inputs.dout) + (dot(lse, inputs.dlse) if with_lse else 0)
    present = [t for t in leaves if t is not None]
    grads = torch.autograd.grad(loss, present, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(grads, present, strict=True)]


def dot(x, gradient):
    """A loss with that gradient; rows in no sequence (NaN gradient) and rows that see nothing (inf) do not count."""
    counts = x.detach().isfinite() & gradient.isfinite()
    return (x * gradient.to(x.dtype)).where(counts, 0).sum()


def learn_dropout(inputs, probs):
    """The oracle drops what the call says that it dropped: S_dmask's signs."""
    rows = zip(inputs.problem.q_rows, inputs.problem.k_rows, strict=True)
    inputs.problem.keep = [~torch.signbit(probs[b, :, : len(q), : len(k)]) for b, (q, k) in enumerate(rows)]


def check_results(inputs, out, lse):
    dtype = inputs.q.dtype
    truth_out, truth_lse = oracle(inputs, torch.float64)
    budget_out, _ = oracle(inputs, dtype)
    _, budget_lse = oracle(inputs, torch.float32)
    assert out.dtype == dtype and lse.dtype == torch.float32
    scale = truth_out.abs().max().item() if truth_out.numel() else 0.0
    reference.assert_close("out", out, truth_out, budget_out, 2, reference.floor_of(dtype, scale))
    finite = truth_lse[truth_lse.isfinite()]
    # The score is subtracted from and added back, so that the LSE's error is of the largest score's size, at least 1.
    scale = max(1.0, finite.abs().max().item()) if finite.numel() else 1.0
    reference.assert_close("lse", lse, truth_lse, budget_lse, 2, reference.floor_of(torch.float32, scale))


def check_forward(strobe, inputs, **extra):
    """Runs the call into poisoned outputs where it takes them, and compares out and LSE."""
    *lead, _ = inputs.q.shape
    poisoned = torch.full((*lead, inputs.v.shape[-1]), float("nan"), dtype=inputs.q.dtype)
    out, lse, probs = run(strobe, inputs, return_attn_probs=True, out=poisoned, **extra)
    assert out.data_ptr() == poisoned.data_ptr()
    if inputs.case.dropout:
        learn_dropout(inputs, probs)
    check_results(inputs, out, lse)
    return out, lse, probs


def check_gradients(strobe, inputs, with_lse=True, **extra):
    """Forward and backward through autograd; compares out, LSE and every gradient."""
    leaves = [inputs.q, inputs.k, inputs.v] + ([inputs.sinks] if inputs.sinks is not None else [])
    leaves = [t.detach().requires_grad_() for t in leaves]
    out, lse, probs = run(strobe, inputs, *leaves, return_attn_probs=True, **extra)
    if inputs.case.dropout:
        learn_dropout(inputs, probs)
    check_results(inputs, out, lse)
    # What a loss gives to rows that see nothing: a finite number. Rows in no sequence get NaN, which must not leak.
    results, gradients = [out], [inputs.dout]
    if with_lse:
        results, gradients = [out, lse], [inputs.dout, inputs.dlse]
    actual = torch.autograd.grad(results, leaves, gradients)

    truth = oracle_gradients(inputs, torch.float64, with_lse)
    budget = oracle_gradients(inputs, inputs.q.dtype, with_lse)
    dlse = None
    if with_lse:  # to the oracle's [h, rows]
        dlse = inputs.dlse if inputs.q.ndim == 3 else inputs.dlse.transpose(0, 1).flatten(1)
    scales = reference.gradient_scales(inputs.problem, inputs.q, inputs.k, inputs.v, inputs.sinks, inputs.dout, dlse)
    for i, name in enumerate(("dq", "dk", "dv", "dsinks")[: len(actual)]):
        assert actual[i].dtype == leaves[i].dtype
        # dsinks is f32, but comes from out and dout in q's dtype.
        floor = reference.floor_of(inputs.q.dtype, scales[i])
        reference.assert_close(name, actual[i], truth[i], budget[i], 3, floor)
    return actual
