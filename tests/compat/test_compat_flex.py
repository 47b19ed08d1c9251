"""FlexHeadFA's dialects: eight results, pairs of windows, and the Hopper module's functions."""

import flash_attn_interface as hopper
import flex_head_fa
import flex_head_fa_2_cuda
import pytest
import torch
from flex_head_fa import flash_attn_interface as interface
from oracle import check_both, check_gradients, dense, offsets, packed, tensors

DIMS = dict(d=16, dv=40, heads=12, heads_k=4, heads_v=6)
MASK = dict(causal=True, window=(4, 0))


def test_private_dense():
    q, k, v = tensors(2, 9, 11, **DIMS)
    results = interface._flash_attn_forward(q, k, v, 0.0, 0.3, True, (4, 0), 0.0, None, False)
    out, q_padded, k_padded, v_padded, out_padded, lse, probs, rng_state = results
    assert q_padded is q and k_padded is k and v_padded is v and out_padded is out

    def compute(*x):
        return dense(*x, scale=0.3, **MASK)

    check_both((out, lse), compute, q, k, v)
    dout = torch.randn_like(out)
    buffers = [torch.empty_like(x) for x in (q, k, v)]
    gradients = interface._flash_attn_backward(
        dout, q, k, v, out, lse, *buffers, 0.0, 0.3, True, (4, 0), 0.0, None, False, rng_state
    )
    check_gradients(buffers, compute, q, k, v, dout)
    assert all(a is b for a, b in zip(gradients, buffers, strict=False)) and gradients[3].shape == (2, 12, 128)
    raw = flex_head_fa_2_cuda.fwd(q, k, v, None, None, 0.0, 0.3, True, 4, 0, 0.0, False, None)
    assert len(raw) == 8 and torch.equal(raw[0], out) and torch.equal(raw[5], lse)
    again = flex_head_fa_2_cuda.bwd(
        dout, q, k, v, out, lse, None, None, None, None, 0.0, 0.3, True, 4, 0, 0.0, False, None, rng_state
    )
    assert torch.equal(again[0], buffers[0])


def test_private_varlen():
    lens_q, lens_k = [4, 5], [6, 7]
    q, k, v = tensors(None, 9, 13, **DIMS)
    cu_q, cu_k = offsets(lens_q), offsets(lens_k)
    head = (cu_q, cu_k, 5, 7, 0.0, 0.3, True)
    results = interface._flash_attn_varlen_forward(q, k, v, *head, window_size=(4, 0))
    assert len(results) == 8

    def compute(*x):
        return packed(*x, lens_q, lens_k, scale=0.3, **MASK)

    out, lse = results[0], results[5]
    check_both((out, lse), compute, q, k, v)
    dout, buffers = torch.randn_like(out), [torch.empty_like(x) for x in (q, k, v)]
    interface._flash_attn_varlen_backward(dout, q, k, v, out, lse, *buffers, *head, (4, 0), 0.0, None, False)
    check_gradients(buffers, compute, q, k, v, dout)
    raw = flex_head_fa_2_cuda.varlen_fwd(
        q, k, v, None, cu_q, cu_k, None, None, None, None, 5, 7, 0.0, 0.3, False, True, 4, 0, 0.0, False, None
    )
    assert len(raw) == 8 and torch.equal(raw[0], out) and flex_head_fa.__version__ == "0.1.2"


@pytest.mark.parametrize("backends", [{}, dict(forward_backend="cpu", backward_backend="cpu")], ids=str)
def test_f3b2(backends):
    q, k, v = tensors(2, 9, 11, 4, 2, 16, 24, grad=True)

    def compute(*x):
        return dense(*x, scale=0.3, causal=True)

    out = hopper.flash_attn_f3b2_func(q, k, v, 0.3, True, True, **backends)
    dout = torch.randn_like(out)
    check_gradients(torch.autograd.grad(out, (q, k, v), dout), compute, q, k, v, dout)
    flat = [x.detach().flatten(0, 1).requires_grad_() for x in (q, k, v)]
    out, lse = hopper.flash_attn_f3b2_varlen_func(
        *flat, offsets([9, 9]), offsets([11, 11]), 9, 11, 0.3, True, False, **backends
    )

    def compute_packed(*x):
        return packed(*x, [9, 9], [11, 11], scale=0.3, causal=True)

    check_both((out, lse), compute_packed, *flat)
    gradients = torch.autograd.grad(out, flat, dout.flatten(0, 1))
    check_gradients(gradients, compute_packed, *flat, dout.flatten(0, 1))


def test_f3b2_passes_each_engine_its_pass():
    q, k, v = tensors(1, 4, 4, grad=True)
    with pytest.raises(ValueError, match="backend is 'none'"):
        hopper.flash_attn_f3b2_func(q, k, v, forward_backend="none")
    out = hopper.flash_attn_f3b2_func(q, k, v, forward_backend="cpu", backward_backend="none")
    with pytest.raises(ValueError, match="backend is 'none'"):
        out.sum().backward()


def test_positions_of_the_hopper_module():
    """deterministic comes sixth in FlexHeadFA, where FlashAttention 3 has a tensor; varlen returns a pair."""
    q, k, v = tensors(1, 9, 9)
    expected = hopper.flash_attn_func(q, k, v, 0.3, True)
    assert torch.equal(hopper.flash_attn_func(q, k, v, 0.3, True, True), expected)
    cu = offsets([9])
    flat = (q[0], k[0], v[0], cu, cu, 9, 9)
    for more in ((0.3,), (None, True), (0.3, True), (0.3, True, False), (0.3, False, True)):
        out, lse = hopper.flash_attn_varlen_func(*flat, *more)
        scale, causal = more[0], len(more) > 1 and more[1]
        assert torch.equal(out, hopper.flash_attn_func(q, k, v, scale, causal)[0]) and lse.shape == (4, 9)
    assert torch.equal(hopper.flash_attn_varlen_func(*flat, None, None, 0.3, True), expected[0])
    with pytest.raises(TypeError, match="causal is given by position and by keyword"):
        hopper.flash_attn_varlen_func(*flat, 0.3, True, causal=True)
