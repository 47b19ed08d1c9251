"""Packed, partly used, left-padded and paged sequences."""

from dataclasses import replace

import pytest
import torch

from cases import RAGGED_CHANGES, Case, everything, make_inputs, run
from checks import check_forward, check_gradients

PACKED = Case((20, 1, 0, 65, 7), (20, 50, 9, 0, 130), head_dim=32, head_dim_v=48, heads=4, heads_k=2, heads_v=1)
PACKED = replace(PACKED, layout="packed")
CHANGES = [
    *RAGGED_CHANGES,
    dict(strided="transposed", full_from=(3, 0, 1, 30, 2), window=(2, 0)),
]


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_packed(strobe, change, dtype):
    inputs = make_inputs(replace(PACKED, dtype=dtype, **change))
    check_forward(strobe, inputs)
    check_gradients(strobe, inputs)


@pytest.mark.parametrize("page_size", [1, 3, 16, 256])
@pytest.mark.parametrize("change", [c for c in CHANGES if "strided" not in c], ids=str)
def test_paged(strobe, change, page_size):
    inputs = make_inputs(replace(PACKED, layout="paged", page_size=page_size, **change))
    check_forward(strobe, inputs)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_everything_paged(strobe, dtype):
    check_forward(strobe, make_inputs(replace(everything(), layout="paged", page_size=3, dtype=dtype)))


def test_rows_of_no_sequence_are_cleared(strobe):
    """Rows beyond seqused_q: out 0 and LSE +inf, as rows that see nothing; their gradients 0 whatever dout holds."""
    inputs = make_inputs(replace(PACKED, seqused=True), 2)
    leaves = [t.requires_grad_() for t in (inputs.q, inputs.k, inputs.v)]
    out, lse, _ = run(strobe, inputs, *leaves, return_attn_probs=True)
    unused = inputs.q[:, 0, 0].isnan()
    assert unused.any()
    assert (out[unused] == 0).all() and (lse[:, unused] == float("inf")).all()
    dq, dk, dv = torch.autograd.grad(out, leaves, inputs.dout)
    assert (dq[unused] == 0).all()
    unused = inputs.k[:, 0, 0].isnan()
    assert (dk[unused] == 0).all() and (dv[unused] == 0).all()


def test_packed_equals_each_alone(strobe):
    """A sequence's result does not depend on its neighbours."""
    inputs = make_inputs(replace(PACKED, causal=True))
    out = run(strobe, inputs)
    for q_rows, k_rows in zip(inputs.problem.q_rows, inputs.problem.k_rows, strict=True):
        alone = strobe.flash_attn_func(
            inputs.q[q_rows][None], inputs.k[k_rows][None], inputs.v[k_rows][None], causal=True
        )
        torch.testing.assert_close(out[q_rows][None], alone, rtol=1e-5, atol=1e-6)


def test_pages_may_be_shared(strobe):
    """Two sequences with a common prefix, its pages stored once."""
    k, v = torch.randn(4, 16, 2, 32), torch.randn(4, 16, 1, 32)
    table = torch.tensor([[2, 0, 1], [2, 0, 3]], dtype=torch.int32)
    q = torch.randn(2 * 5, 4, 32)
    used = torch.tensor([40, 47], dtype=torch.int32)
    cu = torch.tensor([0, 5, 10], dtype=torch.int32)
    out = strobe.flash_attn_varlen_func(q, k, v, cu, None, 5, 48, causal=True, block_table=table, seqused_k=used)
    for b in range(2):
        pages, n = table[b].long(), used[b].item()
        keys, values = (x[pages].flatten(0, 1)[None, :n] for x in (k, v))
        alone = strobe.flash_attn_func(q[None, 5 * b : 5 * b + 5], keys, values, causal=True)
        torch.testing.assert_close(out[None, 5 * b : 5 * b + 5], alone, rtol=1e-5, atol=1e-6)


def test_paged_lengths_from_cu_seqlens_k(strobe):
    """Without seqused_k the differences of cu_seqlens_k are the lengths."""
    inputs = make_inputs(replace(PACKED, layout="paged", page_size=16, causal=True))
    expected = run(strobe, inputs)
    used = inputs.seqused_k
    cu = torch.cat([torch.zeros(1, dtype=torch.int32), used.cumsum(0).to(torch.int32)])
    inputs.cu_seqlens_k, inputs.seqused_k = cu, None
    assert torch.equal(run(strobe, inputs), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_tensors(strobe, dtype):
    """The qkv- and kv-packed calls equal the plain ones, gradients too."""
    qkv = torch.randn(33, 3, 4, 32).to(dtype).requires_grad_()
    kv, q = torch.randn(33, 2, 2, 32).to(dtype).requires_grad_(), torch.randn(33, 4, 32).to(dtype).requires_grad_()
    cu, weight = torch.tensor([0, 20, 33], dtype=torch.int32), torch.randn(33, 4, 32).to(dtype)
    options = dict(causal=True, window_size=(5, 0), keep_first=2)
    pairs = [
        (
            strobe.flash_attn_varlen_qkvpacked_func(qkv, cu, 20, **options),
            strobe.flash_attn_varlen_func(*qkv.unbind(1), cu, cu, 20, 20, **options),
            (qkv,),
        ),
        (
            strobe.flash_attn_varlen_kvpacked_func(q, kv, cu, cu, 20, 20, **options),
            strobe.flash_attn_varlen_func(q, *kv.unbind(1), cu, cu, 20, 20, **options),
            (q, kv),
        ),
        (
            strobe.flash_attn_qkvpacked_func(qkv[None], **options)[0],
            strobe.flash_attn_func(*qkv[None].unbind(2), **options)[0],
            (qkv,),
        ),
        (
            strobe.flash_attn_kvpacked_func(q[None], kv[None], **options)[0],
            strobe.flash_attn_func(q[None], *kv[None].unbind(2), **options)[0],
            (q, kv),
        ),
    ]
    for packed, plain, leaves in pairs:
        assert torch.equal(packed, plain)
        expected = torch.autograd.grad(plain, leaves, weight)
        assert all(map(torch.equal, torch.autograd.grad(packed, leaves, weight), expected))
