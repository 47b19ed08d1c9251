"""What flash_attn's functions do beside attention itself: returns, scalars, S_dmask, bert_padding, rotary, caches."""

import inspect

import flash_attn
import pytest
import torch
from flash_attn import bert_padding
from flash_attn.flash_attn_interface import _get_block_size_n, maybe_contiguous, round_multiple
from flash_attn.layers import rotary
from flash_attn.ops.triton.rotary import apply_rotary
from oracle import BF16, check, check_both, check_gradients, dense, lengths, offsets, packed, tensors

import strobe
from strobe.compat import fa2

INF = float("inf")


def test_returns():
    q, k, v = tensors(2, 5, 7)
    out, lse, probs = flash_attn.flash_attn_func(q, k, v, return_attn_probs=True)
    assert lse.shape == (2, 4, 5) and lse.dtype == torch.float32 and probs.numel() == 0
    check_both((out, lse), dense, q, k, v)
    out, lse, probs = flash_attn.flash_attn_varlen_func(
        q[0], k[0], v[0], offsets([2, 3]), offsets([3, 4]), 3, 4, return_attn_probs=True
    )
    assert lse.shape == (4, 5)
    check_both((out, lse), lambda *x: packed(*x, [2, 3], [3, 4]), q[0], k[0], v[0])
    out, lse = flash_attn.flash_attn_with_kvcache(q, k, v, return_softmax_lse=True)
    check_both((out, lse), dense, q, k, v)


def test_scalars_may_be_tensors_and_the_window_a_list():
    q, k, v = tensors(None, 8, 8)
    cu, five = offsets([3, 5]), torch.tensor(5)
    out = flash_attn.flash_attn_varlen_func(
        q, k, v, cu, cu, five, five, causal=True, window_size=[torch.tensor(2), torch.tensor(0)]
    )
    check(out, lambda *x: packed(*x, [3, 5], [3, 5], causal=True, window=(2, 0))[0], q, k, v)


def test_kvcache_gives_no_gradient_and_does_not_refuse_parameters():
    q, k, v = tensors(1, 1, 9, grad=True)
    out = flash_attn.flash_attn_with_kvcache(q, k, v, causal=True)
    assert not out.requires_grad
    check(out, lambda *x: dense(*x)[0], q, k, v)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("d,sk", [(16, 300), (64, 200), (128, 150)])
def test_s_dmask_is_normalised_by_the_block_size(causal, d, sk):
    """exp(score - running maximum) over blocks of _get_block_size_n keys from the right; negative where dropped."""
    q, k, v = tensors(1, 40, sk, 2, 2, d)
    out, lse, probs = flash_attn.flash_attn_func(q, k, v, 0.4, causal=causal, return_attn_probs=True)
    width = _get_block_size_n(q.device, d, True, causal)
    assert probs.shape == (1, 2, round_multiple(40, 128), round_multiple(sk, 128))
    score = torch.einsum("bihd,bjhd->bhij", q, k) * d**-0.5
    if causal:
        hidden = torch.arange(sk)[None] > torch.arange(40)[:, None] + sk - 40
        score = score.masked_fill(hidden, -INF)
    running = torch.stack([s.amax(-1) for s in score.split(width, -1)], -1).flip(-1).cummax(-1).values.flip(-1)
    normalised = [
        p * torch.exp(m - lse)[..., None]
        for p, m in zip(probs[:, :, :40, :sk].split(width, -1), running.unbind(-1), strict=True)
    ]
    normalised = torch.cat(normalised, -1)
    torch.testing.assert_close(normalised.abs(), score.softmax(-1), atol=1e-6, rtol=1e-4)
    kept = torch.where(torch.signbit(normalised), 0, normalised) / 0.6
    torch.testing.assert_close(torch.einsum("bhij,bjhd->bihd", kept, v), out, atol=1e-5, rtol=1e-4)


def test_block_sizes():
    sizes = {32: (128, 128), 64: (128, 64), 96: (64, 64), 128: (64, 32), 192: (64, 64), 256: (64, 64)}
    for d, (plain, drop) in sizes.items():
        assert (_get_block_size_n("cpu", d, False, False), _get_block_size_n("cpu", d, True, False)) == (plain, drop)


def test_maybe_contiguous():
    x = torch.randn(3, 4)
    assert maybe_contiguous(x) is x and maybe_contiguous(None) is None
    assert maybe_contiguous(x.T).stride(-1) == 1 and torch.equal(maybe_contiguous(x.T), x.T)


def test_unpad_and_pad_through_a_padded_batch():
    mask = torch.tensor([[0, 1, 1, 0, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]])
    x = torch.randn(3, 5, 2, 4, requires_grad=True)
    rows, indices, cu_seqlens, longest, used = bert_padding.unpad_input(x, mask)
    assert torch.equal(rows, x[mask.bool()]) and indices.tolist() == [1, 2, 4, 5, 6]
    assert (
        cu_seqlens.tolist() == [0, 3, 5, 5] and cu_seqlens.dtype == torch.int32 and (longest, type(longest)) == (3, int)
    )
    assert used.tolist() == [3, 2, 0] and used.dtype == torch.int32
    padded = bert_padding.pad_input(rows, indices, 3, 5)
    assert torch.equal(padded, x * mask[..., None, None])
    (gradient,) = torch.autograd.grad(padded.sum(), x)
    assert torch.equal(gradient, mask[..., None, None].expand_as(x).float())


def test_unpad_counts_only_used_tokens_in_seqused():
    mask, unused = torch.tensor([[1, 0, 0], [1, 1, 0]]), torch.tensor([[0, 1, 0], [0, 0, 1]])
    rows, indices, cu_seqlens, longest, used = bert_padding.unpad_input(torch.randn(2, 3, 1), mask, unused)
    assert indices.tolist() == [0, 1, 3, 4, 5] and cu_seqlens.tolist() == [0, 2, 5]
    assert longest == 3 and used.tolist() == [1, 2] and len(rows) == 5


def test_unpad_concatenated_sequences():
    lens = torch.tensor([[2, 3, 0, 0, 0, 0], [3, 2, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0]])
    x = torch.arange(18.0).reshape(3, 6, 1)
    rows, indices, cu_seqlens, longest = bert_padding.unpad_input_for_concatenated_sequences(x, lens)
    assert cu_seqlens.tolist() == [0, 2, 5, 8, 10, 16] and longest == 6
    assert rows.flatten().tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 12, 13, 14, 15, 16, 17]
    assert torch.equal(indices.float(), rows.flatten())


def test_index_functions():
    x, at = torch.randn(5, 2), torch.tensor([3, 0])
    rows, residual = bert_padding.index_first_axis_residual(x, at)
    assert torch.equal(rows, x[at]) and torch.equal(residual, x)
    put = bert_padding.index_put_first_axis(rows, at, 5)
    assert torch.equal(put[at], rows) and put[[1, 2, 4]].abs().max() == 0


def tables(n=64, width=16, dtype=torch.float32):
    angle = torch.outer(torch.arange(n).float(), 10000.0 ** (-torch.arange(0, width, 2) / width))
    return angle.cos().to(dtype), angle.sin().to(dtype)


def turned(x, position, cos, sin, interleaved):
    """One row at a time, from the definition: (a, b) -> (a cos - b sin, a sin + b cos)."""
    result, half = x.clone().double(), cos.shape[1]
    for n in range(half):
        a, b = (2 * n, 2 * n + 1) if interleaved else (n, n + half)
        c, s = cos[position, n].double(), sin[position, n].double()
        result[..., a], result[..., b] = x[..., a] * c - x[..., b] * s, x[..., a] * s + x[..., b] * c
    return result


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("offset", [0, 5, "tensor"])
def test_rotary(interleaved, offset):
    x, (cos, sin) = torch.randn(2, 6, 3, 24), tables()
    starts = torch.tensor([7, 1]) if offset == "tensor" else torch.tensor([offset, offset])
    out = rotary.apply_rotary_emb(x, cos, sin, interleaved, seqlen_offsets=starts if offset == "tensor" else offset)
    for b in range(2):
        for i in range(6):
            expected = turned(x[b, i].double(), starts[b] + i, cos, sin, interleaved)
            torch.testing.assert_close(out[b, i].double(), expected, atol=1e-6, rtol=0)
    # Packed.
    cu = offsets([6, 6])
    flat = rotary.apply_rotary_emb(x.flatten(0, 1), cos, sin, interleaved, seqlen_offsets=starts, cu_seqlens=cu)
    assert torch.equal(flat, out.flatten(0, 1))
    # And back: the transpose of a turn is its inverse.
    assert torch.equal(apply_rotary(x, cos, sin, starts, interleaved=interleaved), out)
    back = apply_rotary(out, cos, sin, starts, interleaved=interleaved, conjugate=True)
    torch.testing.assert_close(back, x, atol=1e-6, rtol=0)


def test_rotary_in_place_and_its_gradient():
    cos, sin = tables()
    x = torch.randn(1, 6, 2, 16, requires_grad=True)
    dout = torch.randn(1, 6, 2, 16)
    (expected,) = torch.autograd.grad(rotary.apply_rotary_emb_torch(x, cos[:6], sin[:6]), x, dout)
    copy = x * 1
    out = rotary.apply_rotary_emb(copy, cos, sin, inplace=True)
    assert out.data_ptr() == copy.data_ptr() and torch.equal(copy, rotary.apply_rotary_emb_torch(x, cos[:6], sin[:6]))
    (gradient,) = torch.autograd.grad(out, x, dout)
    assert torch.equal(gradient, expected)
    half = rotary.rotate_half(torch.arange(4.0))
    assert half.tolist() == [-2, -3, 0, 1] and rotary.rotate_half(torch.arange(4.0), True).tolist() == [-1, 0, -3, 2]


def test_rotary_of_qkv_and_kv_in_place():
    cos, sin = tables()
    q, k, v = tensors(2, 6, 6, 4, 4)
    qkv = torch.stack((q, k, v), 2)
    rotary.apply_rotary_emb_qkv_(qkv, cos, sin, seqlen_offsets=3)
    tq, tk = (rotary.apply_rotary_emb(x, cos, sin, seqlen_offsets=3) for x in (q, k))
    assert torch.equal(qkv, torch.stack((tq, tk, v), 2))
    grouped = torch.cat((q, k[:, :, :2], v[:, :, :2]), 2)
    rotary.apply_rotary_emb_qkv_(grouped, cos, sin, seqlen_offsets=3, num_heads_q=4)
    assert torch.equal(grouped, torch.cat((tq, tk[:, :, :2], v[:, :, :2]), 2))
    kv = torch.stack((k, v), 2)
    rotary.apply_rotary_emb_kv_(kv, cos, sin, seqlen_offsets=3)
    assert torch.equal(kv, torch.stack((tk, v), 2))


@pytest.mark.parametrize("scale_base", [None, 32])
def test_rotary_module(scale_base):
    """Scores depend on the distance alone, with and without XPos's decay."""
    layer = rotary.RotaryEmbedding(16, scale_base=scale_base)
    q, k = torch.randn(16), torch.randn(16)
    qkv = torch.stack([x.expand(1, 12, 1, 16) for x in (q, k, k)], 2).clone()
    out = layer(qkv)
    score = torch.einsum("ihd,jhd->ij", out[0, :, 0], out[0, :, 1])
    for distance in range(12):
        diagonal = score.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-4, rtol=1e-4)
    assert torch.equal(out[0, :, 2, 0], k.expand(12, 16))
    tq, tkv = layer(qkv[:, :, 0].clone(), kv=qkv[:, :, 1:].clone(), seqlen_offset=torch.tensor([3]))
    assert tq.shape == (1, 12, 1, 16) and tkv.shape == (1, 12, 2, 1, 16) and layer._seqlen_cached == 15


def test_packed_functions_with_gradients():
    q, k, v = tensors(None, 9, 9, 2, 2, grad=True)
    cu, lens = offsets([4, 5]), [4, 5]
    dout = torch.randn(9, 2, 16)

    def compute(*x):
        return packed(*x, lens, lens, causal=True)

    qkv = torch.stack((q, k, v), 1)
    for out in (
        flash_attn.flash_attn_varlen_qkvpacked_func(qkv, cu, 5, causal=True),
        flash_attn.flash_attn_varlen_kvpacked_func(q, qkv[:, 1:], cu, cu, 5, 5, causal=True),
    ):
        check_gradients(torch.autograd.grad(out, (q, k, v), dout, retain_graph=True), compute, q, k, v, dout)


def test_half_types():
    q, k, v = tensors(2, 9, 12, dtype=BF16)
    check(flash_attn.flash_attn_func(q, k, v, causal=True), lambda *x: dense(*x, causal=True)[0], q, k, v)


def test_cache_update_with_pages_of_any_size():
    q, k, v = tensors(2, 2, 40)
    used, new = lengths(17, 30), 3
    table = torch.randperm(16).int().reshape(2, 8)
    pages = [torch.full((16, 5, 2, 16), float("nan")) for _ in "kv"]
    fresh = [torch.randn(2, new, 2, 16) for _ in "kv"]
    whole = []
    for b, n in enumerate(used.tolist()):
        for x, store, add in zip((k, v), pages, fresh, strict=True):
            for j in range(n):
                store[table[b, j // 5], j % 5] = x[b, j]
        whole.append([torch.cat((x[b, :n], add[b])) for x, add in zip((k, v), fresh, strict=True)])
    out = flash_attn.flash_attn_with_kvcache(
        q, *pages, *fresh, cache_seqlens=used, block_table=table, causal=True, window_size=(6, 0), keep_first=2
    )
    for b in range(2):
        mask = dict(causal=True, window=(6, 0), keep_first=2)
        check(out[b : b + 1], lambda *x, m=mask: dense(*x, **m)[0], q[b : b + 1], *(x[None] for x in whole[b]))


@pytest.mark.parametrize("d,dv", [(20, 20), (60, 100), (16, 12)])
def test_head_dims_that_gpu_engines_have_not_are_padded(d, dv):
    q, k, v = inputs = tensors(2, 9, 13, d=d, dv=dv, grad=True)
    signature = inspect.signature(strobe.flash_attn_func)
    out, lse, _ = fa2.padded(strobe.flash_attn_func, signature.bind(q, k, v, causal=True, return_attn_probs=True))

    def compute(*x):
        return dense(*x, causal=True)

    check_both((out, lse), compute, q, k, v)
    dout = torch.randn_like(out)
    check_gradients(torch.autograd.grad(out, inputs, dout), compute, q, k, v, dout)
    qkv = torch.randn(2, 9, 3, 4, d)
    function = strobe.flash_attn_qkvpacked_func
    result = fa2.padded(function, inspect.signature(function).bind(qkv))
    assert (result is None) == (d % 8 == 0)
    if result is not None:
        check(result, lambda *x: dense(*x)[0], *qkv.unbind(2))


def test_nothing_is_padded_that_would_change_nothing_or_lose_out():
    signature = inspect.signature(strobe.flash_attn_func)
    q, k, v = tensors(1, 4, 4, d=16)
    assert fa2.padded(strobe.flash_attn_func, signature.bind(q, k, v)) is None
    q, k, v = tensors(1, 4, 4, d=20)
    assert fa2.padded(strobe.flash_attn_func, signature.bind(q, k, v, out=torch.empty_like(q))) is None
