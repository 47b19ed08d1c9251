"""Backward: dq, dk, dv, dsinks, with and without a gradient of the LSE, against autograd through the oracle."""

from dataclasses import replace

import pytest
import torch

from cases import Case, everything, grid, make_inputs, run
from checks import check_gradients


@pytest.mark.parametrize("case", grid(), ids=str)
def test_backward(strobe, case):
    check_gradients(strobe, make_inputs(case))


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("with_lse", [False, True])
def test_everything_in_one_call(strobe, dtype, with_lse):
    for seed in range(3):
        check_gradients(strobe, make_inputs(replace(everything(), dtype=dtype), seed), with_lse)


PER_SEQUENCE = [dict(force_fa_decode=True), dict(full_from=(3, 0, 40, 12)), dict(full_from=9)]


@pytest.mark.parametrize("change", PER_SEQUENCE, ids=str)
def test_per_sequence_masks(strobe, change):
    base = Case((30, 1, 41, 13), (30, 50, 41, 77), head_dim=24, heads=4, heads_k=2, heads_v=1, layout="packed")
    check_gradients(strobe, make_inputs(replace(base, causal=True, window=(4, 0), keep_first=2, **change)))


def test_lse_gradient_alone(strobe):
    """out does not reach the loss: v gets zero, q and k the softmax's own gradient."""
    q, k, v = (torch.randn(1, 19, 2, 16, requires_grad=True) for _ in range(3))
    _, lse, _ = strobe.flash_attn_func(q, k, v, return_attn_probs=True)
    weight = torch.randn(1, 2, 19)
    dq, dk, dv = torch.autograd.grad((lse * weight).sum(), (q, k, v), allow_unused=True)
    score = torch.einsum("bihd,bjhd->bhij", q, k) * 16**-0.5
    expected = torch.autograd.grad((score.logsumexp(-1) * weight).sum(), (q, k))
    torch.testing.assert_close((dq, dk), expected, rtol=1e-4, atol=1e-5)
    assert dv is None or (dv == 0).all()


def test_sink_gradient_alone(strobe):
    inputs = make_inputs(Case((25,), heads=4, head_dim=16, sinks=True, causal=True))
    sinks = inputs.sinks.requires_grad_()
    run(strobe, inputs).square().sum().backward()
    expected = torch.zeros(4)
    for h in range(4):
        for sign in (1, -1):
            moved = sinks.detach().clone()
            moved[h] += sign * 1e-2
            expected[h] += sign * run(strobe, inputs, sinks=moved).double().square().sum() / 2e-2
    torch.testing.assert_close(sinks.grad, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("wanted", ["q", "k", "v"])
def test_one_gradient_only(strobe, wanted):
    tensors = dict(zip("qkv", (torch.randn(2, 21, 3, 16) for _ in range(3)), strict=True))
    weight = torch.randn(2, 21, 3, 16)
    leaves = {n: t.clone().requires_grad_() for n, t in tensors.items()}
    (strobe.flash_attn_func(**leaves) * weight).sum().backward()
    tensors[wanted].requires_grad_()
    (strobe.flash_attn_func(**tensors) * weight).sum().backward()
    assert torch.equal(tensors[wanted].grad, leaves[wanted].grad)


def test_expanded_and_strided_gradients(strobe):
    base = torch.randn(1, 30, 1, 32, requires_grad=True)
    key = torch.randn(2, 32, 4, 30, requires_grad=True)
    weight = torch.randn(2, 30, 4, 32)

    def loss(copy):
        q, k = base.expand(2, 30, 4, 32), key.transpose(1, 3)
        q, k = (q.contiguous(), k.contiguous()) if copy else (q, k)
        return (strobe.flash_attn_func(q, k, k) * weight).sum()

    expected = torch.autograd.grad(loss(True), (base, key))
    torch.testing.assert_close(torch.autograd.grad(loss(False), (base, key)), expected)


def test_zero_stride_output_gradient(strobe):
    """out.sum() sends an expanded tensor back."""
    leaves = [torch.randn(1, 20, 2, 16, requires_grad=True) for _ in range(3)]
    expected = torch.autograd.grad((strobe.flash_attn_func(*leaves) * torch.ones(1, 20, 2, 16)).sum(), leaves)
    assert all(map(torch.equal, torch.autograd.grad(strobe.flash_attn_func(*leaves).sum(), leaves), expected))


@pytest.mark.parametrize("change", [{}, dict(heads=6, heads_k=2, heads_v=1), dict(dropout=0.2)], ids=str)
def test_deterministic(strobe, change):
    inputs = make_inputs(Case((150,), head_dim=32, causal=True, **change))
    results = []
    for _ in range(2):
        torch.manual_seed(5)
        leaves = [t.detach().requires_grad_() for t in (inputs.q, inputs.k, inputs.v)]
        out = run(strobe, inputs, *leaves, deterministic=True)
        results.append(torch.autograd.grad(out, leaves, inputs.dout))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("asked", [False, True])
def test_torch_may_ask_for_determinism(strobe, asked, monkeypatch):
    """A CPU's gradients are deterministic in any case: what counts is that an engine hears of it."""
    from strobe import _extension

    heard = []

    class Extension:
        @staticmethod
        def backward(tensors, options, *gradients):
            heard.append(options.deterministic)
            return backward(tensors, options, *gradients)

    backward = _extension._C.backward
    monkeypatch.setattr(_extension, "_C", Extension)
    q = torch.randn(1, 4, 1, 8, requires_grad=True)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(asked)
    try:
        strobe.flash_attn_func(q, q, q).sum().backward()
    finally:
        torch.use_deterministic_algorithms(before)
    assert heard == [asked]
