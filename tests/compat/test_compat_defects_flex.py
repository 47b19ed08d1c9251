"""What goes wrong in FlexHeadFA, one test each. F1 .. F11 number its known defects."""

import flash_attn_interface as hopper
import flex_head_fa
import pytest
import torch
from oracle import BF16, check, check_both, check_gradients, dense, lengths, offsets, packed, tensors

UNEVEN = [(64, 96), (128, 192), (192, 64), (64, 192), (256, 128), (40, 72), (72, 40)]


@pytest.mark.parametrize("d,dv", [(64, 128), (192, 128), (32, 64)])
def test_f1_the_varlen_backward_rejects_other_head_dims_of_v(d, dv):
    q, k, v = tensors(None, 9, 13, 4, 2, d, dv, grad=True)
    call = (offsets([4, 5]), offsets([6, 7]), 5, 7)

    def compute(*x):
        return packed(*x, [4, 5], [6, 7], causal=True)

    for function in (flex_head_fa.flash_attn_varlen_func, hopper.flash_attn_varlen_func):
        out = function(q, k, v, *call, causal=True)
        dout = torch.randn_like(out)
        check_gradients(torch.autograd.grad(out, (q, k, v), dout), compute, q, k, v, dout)


@pytest.mark.parametrize("d,dv", UNEVEN)
def test_f2_v_is_read_and_out_written_in_neighbouring_heads(d, dv):
    q, k, v = tensors(1, 70, 70, 2, 1, d, dv)
    wide_v = torch.full((1, 70, 3, 2 * dv), float("nan"))
    wide_v[:, :, 1:2, :dv] = v
    wide_out = torch.full((1, 70, 6, 2 * dv), 77.0)
    buffer = wide_out[:, :, 2:4, :dv]
    out = flex_head_fa.flash_attn_func(q, k, wide_v[:, :, 1:2, :dv], causal=True, out=buffer)
    assert out.data_ptr() == buffer.data_ptr()
    check(buffer, lambda *x: dense(*x, causal=True)[0], q, k, v)
    wide_out[:, :, 2:4, :dv] = 77.0
    assert (wide_out == 77.0).all()


@pytest.mark.parametrize("num_splits", [1, 3, 16])
@pytest.mark.parametrize("d,dv", UNEVEN)
def test_f3_partial_results_of_splits_overlap(d, dv, num_splits):
    q, k, v = tensors(2, 1, 900, 4, 2, d, dv)
    out, lse = flex_head_fa.flash_attn_with_kvcache(q, k, v, num_splits=num_splits, return_softmax_lse=True)
    check_both((out, lse), dense, q, k, v)


@pytest.mark.parametrize("d,dv", UNEVEN)
def test_f4_gradients_of_uneven_head_dims_share_one_predicate(d, dv):
    q, k, v = tensors(1, 70, 90, 2, 1, d, dv, grad=True)
    out = flex_head_fa.flash_attn_func(q, k, v, causal=True)
    dout = torch.randn_like(out)
    gradients = torch.autograd.grad(out, (q, k, v), dout)
    check_gradients(gradients, lambda *x: dense(*x, causal=True), q, k, v, dout)


@pytest.mark.parametrize("d,dv", [(20, 32), (32, 20), (20, 33), (17, 17)])
def test_f5_the_cache_is_padded_by_the_wrong_head_dim(d, dv):
    q, k, v = tensors(2, 2, 12, 4, 2, d, dv)
    caches = [torch.full((2, 20, 2, x.shape[-1]), float("nan")) for x in (k, v)]
    for cache, x in zip(caches, (k, v), strict=True):
        cache[:, :10] = x[:, :10]
    places = [cache.data_ptr() for cache in caches]
    out = flex_head_fa.flash_attn_with_kvcache(q, *caches, k[:, 10:], v[:, 10:], cache_seqlens=10, causal=True)
    check(out, lambda *x: dense(*x, causal=True)[0], q, k, v)
    for cache, x, place in zip(caches, (k, v), places, strict=True):
        assert torch.equal(cache[:, :12], x) and cache[:, 12:].isnan().all() and cache.data_ptr() == place


@pytest.mark.parametrize("heads,heads_k,heads_v", [(12, 4, 6), (12, 6, 4), (30, 5, 6), (8, 1, 8)])
def test_f6_decoding_folds_heads_that_do_not_divide_each_other(heads, heads_k, heads_v):
    q, k, v = tensors(2, 1, 50, heads, heads_k, 32, heads_v=heads_v)
    check(flex_head_fa.flash_attn_func(q, k, v), lambda *x: dense(*x)[0], q, k, v)
    check(flex_head_fa.flash_attn_with_kvcache(q, k, v), lambda *x: dense(*x)[0], q, k, v)
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    out = flex_head_fa.flash_attn_varlen_func(*flat, offsets([1, 1]), offsets([50, 50]), 1, 50)
    check(out, lambda *x: packed(*x, [1, 1], [50, 50])[0], *flat)


@pytest.mark.parametrize("dv", [64, 128, 256])
@pytest.mark.parametrize("d", [32, 64, 128, 256])
def test_f7_an_unsupported_pair_leaves_the_output_uninitialised(d, dv):
    q, k, v = tensors(1, 40, 40, 2, 1, d, dv, dtype=BF16)
    flat = [x[0] for x in (q, k, v)]
    cu = offsets([40])
    outs = [
        hopper.flash_attn_func(q, k, v, None, True, False),
        hopper.flash_attn_f3b2_func(q, k, v, None, True),
        hopper.flash_attn_varlen_func(*flat, cu, cu, 40, 40, causal=True)[None],
        hopper.flash_attn_f3b2_varlen_func(*flat, cu, cu, 40, 40, None, True)[0][None],
    ]
    for out in outs:
        check(out, lambda *x: dense(*x, causal=True)[0], q, k, v)


def test_f8_the_backward_of_f3b2_varlen_raises():
    q, k, v = tensors(None, 9, 13, 4, 2, 128, 256, grad=True)
    out, _ = hopper.flash_attn_f3b2_varlen_func(q, k, v, offsets([4, 5]), offsets([6, 7]), 5, 7, None, True)
    dout = torch.randn_like(out)
    gradients = torch.autograd.grad(out, (q, k, v), dout)
    check_gradients(gradients, lambda *x: packed(*x, [4, 5], [6, 7], causal=True), q, k, v, dout)


@pytest.mark.parametrize("function", ["flash_attn_func", "flash_attn_f3b2_func"])
def test_f9_gradients_of_q_and_k_are_cut_to_the_width_of_v(function):
    q, k, v = tensors(1, 9, 9, 4, 2, 192, 128, grad=True)
    out = getattr(hopper, function)(q, k, v)
    dout = torch.randn_like(out)
    gradients = torch.autograd.grad(out, (q, k, v), dout)
    assert [g.shape for g in gradients] == [x.shape for x in (q, k, v)]
    check_gradients(gradients, dense, q, k, v, dout)


@pytest.mark.parametrize("d,dv", [(32, 256), (256, 32), (64, 512)])
def test_f10_splits_are_planned_for_another_block_than_the_kernel_has(d, dv):
    q, k, v = tensors(1, 1, 3000, 4, 1, d, dv)
    for num_splits in (0, 5):
        out = flex_head_fa.flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths(2999), num_splits=num_splits)
        check(out, lambda *x: dense(*x)[0], q, k[:, :2999], v[:, :2999])


def test_f11_varlen_returns_a_pair_and_dense_does_not():
    """As FlexHeadFA's programs expect in its order; FlashAttention 3's order returns out alone, as it does."""
    q, k, v = tensors(1, 9, 9)
    cu = offsets([9])
    flat = [x[0] for x in (q, k, v)]
    assert isinstance(hopper.flash_attn_func(q, k, v, None, True, False), torch.Tensor)
    out, lse = hopper.flash_attn_varlen_func(*flat, cu, cu, 9, 9, None, True)
    assert out.shape == flat[0].shape and lse.shape == (4, 9)
    assert isinstance(hopper.flash_attn_varlen_func(*flat, cu, cu, 9, 9, causal=True), torch.Tensor)
