"""The routes beside plain eager calls give the same gradients, or refuse."""

import pytest
import torch


@pytest.fixture
def qkv():
    torch.manual_seed(0)
    return [torch.randn(2, 20, 4, 16, requires_grad=True) for _ in range(3)]


def loss(strobe, q, k, v):
    return strobe.flash_attn_func(q, k, v, causal=True).square().sum()


def test_compile_fullgraph(strobe, qkv):
    compiled = torch.compile(lambda *x: loss(strobe, *x), fullgraph=True, backend="aot_eager")
    for a, b in zip(
        torch.autograd.grad(compiled(*qkv), qkv), torch.autograd.grad(loss(strobe, *qkv), qkv), strict=True
    ):
        assert torch.equal(a, b)


def test_func_grad(strobe, qkv):
    plain = [x.detach() for x in qkv]
    ours = torch.func.grad(lambda *x: loss(strobe, *x), argnums=(0, 1, 2))(*plain)
    for a, b in zip(ours, torch.autograd.grad(loss(strobe, *qkv), qkv), strict=True):
        assert torch.equal(a, b)


def test_vmap(strobe, qkv):
    plain = [torch.stack((x.detach(), 2 * x.detach())) for x in qkv]
    mapped = torch.func.vmap(lambda *x: strobe.flash_attn_func(*x, causal=True))(*plain)
    for n in range(2):
        assert torch.equal(mapped[n], strobe.flash_attn_func(*(x[n] for x in plain), causal=True))


def test_forward_mode_and_second_derivatives_are_refused(strobe, qkv):
    with pytest.raises(NotImplementedError, match="flash_attn_func: forward-mode"):
        torch.func.jvp(lambda q: strobe.flash_attn_func(q, q, q), (qkv[0].detach(),), (qkv[0].detach(),))
    (gradient,) = torch.autograd.grad(loss(strobe, *qkv), qkv[0], create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives are not implemented"):
        gradient.sum().backward()
