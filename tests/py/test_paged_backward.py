"""Gradients of paged keys: of the page pool's shape, summed where sequences share pages, zero where nobody reads."""

from dataclasses import replace

import pytest
import torch

from cases import RAGGED_CHANGES, Case, everything, make_inputs, run
from checks import check_gradients

NAN = float("nan")
PAGED = Case((20, 1, 0, 65, 7), (20, 50, 9, 0, 230), head_dim=32, head_dim_v=48, heads=4, heads_k=2, heads_v=1)
PAGED = replace(PAGED, layout="paged", page_size=16)


def share_pages(inputs, prefixes):
    """Sequence `to` of each (to, from, pages) in `prefixes` reads the first pages of sequence `from` instead of its
    own, which nobody uses from then on: they turn into NaN."""
    size, table = inputs.case.page_size, inputs.page_table
    for to, source, pages in prefixes:
        table[to, :pages] = table[source, :pages]
    for b, rows in enumerate(inputs.problem.k_rows):
        pad = 0 if inputs.leftpad_k is None else inputs.leftpad_k[b].item()
        index = torch.arange(len(rows)) + pad
        inputs.problem.k_rows[b] = table[b].long()[index // size] * size + index % size
    unused = unused_rows(inputs)
    for t in (inputs.k, inputs.v):
        t[unused] = NAN
    return inputs


def unused_rows(inputs):
    unused = torch.ones(inputs.k.shape[:2], dtype=torch.bool)
    unused.view(-1)[torch.cat(inputs.problem.k_rows)] = False
    return unused


def check(strobe, inputs):
    """check_gradients() compares the rows in use; the others must be zero, not what pages hold."""
    _, dk, dv = check_gradients(strobe, inputs)[:3]
    unused = unused_rows(inputs)
    assert dk.shape == inputs.k.shape and dv.shape == inputs.v.shape
    assert unused.any() and (dk[unused] == 0).all() and (dv[unused] == 0).all()


@pytest.mark.parametrize("page_size", [1, 7, 16, 256])
@pytest.mark.parametrize("change", RAGGED_CHANGES, ids=str)
def test_gradients_of_pages(strobe, change, page_size):
    check(strobe, make_inputs(replace(PAGED, page_size=page_size, **change)))


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("heads", [(4, 4, 4), (4, 1, 1), (4, 2, 1), (6, 2, 3)], ids=str)
@pytest.mark.parametrize("page_size", [1, 7, 16])
def test_shared_pages_sum(strobe, dtype, heads, page_size):
    """Sequences 1 and 2 share all that they can with sequence 0, and 3 shares a part with 1."""
    base = Case((30, 8, 1, 40), (333, 290, 60, 97), dtype, 40, 24, *heads, layout="paged", page_size=page_size)
    for change in (dict(), dict(causal=True, window=(21, 0), keep_first=5), dict(window=(200, 3), sinks=True)):
        inputs = make_inputs(replace(base, **change))
        check(strobe, share_pages(inputs, [(1, 0, 210 // page_size), (2, 0, -(-60 // page_size)), (3, 1, 3)]))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_one_page_twice_in_a_sequence(strobe, dtype):
    inputs = make_inputs(Case((9, 5), (250, 48), dtype, 16, layout="paged", page_size=16))
    inputs.page_table[0, 3:13] = inputs.page_table[0, 2]
    check(strobe, share_pages(inputs, [(1, 0, 3)]))


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_everything(strobe, dtype):
    for seed in range(3):
        check(strobe, make_inputs(replace(everything(), layout="paged", page_size=3, dtype=dtype), seed))


def test_no_keys_at_all(strobe):
    """No page is in use."""
    inputs = make_inputs(Case((3, 2), (0, 0), layout="paged", page_size=4, head_dim=8))
    leaves = [t.requires_grad_() for t in (inputs.q, inputs.k, inputs.v)]
    grads = torch.autograd.grad(run(strobe, inputs, *leaves), leaves, inputs.dout)
    assert all((g == 0).all() and g.shape == t.shape for g, t in zip(grads, leaves, strict=True))


def test_equals_packed(strobe):
    """The same keys, packed: the same gradients but for the order of the sums."""
    inputs = make_inputs(replace(PAGED, causal=True))
    leaves = [t.requires_grad_() for t in (inputs.q, inputs.k, inputs.v)]
    dq, dk, dv = torch.autograd.grad(run(strobe, inputs, *leaves), leaves, inputs.dout)
    rows = torch.cat(inputs.problem.k_rows)
    packed = [inputs.q.detach(), *(t.detach().flatten(0, 1)[rows] for t in leaves[1:])]
    packed = [t.requires_grad_() for t in packed]
    lengths = torch.tensor([0, *(len(r) for r in inputs.problem.k_rows)])
    cu_k = lengths.cumsum(0).int()
    out = strobe.flash_attn_varlen_func(
        *packed, inputs.cu_seqlens_q, cu_k, inputs.capacity_q, inputs.capacity_k, causal=True
    )
    expected = torch.autograd.grad(out, packed, inputs.dout)
    actual = dq, dk.flatten(0, 1)[rows], dv.flatten(0, 1)[rows]
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_bits_do_not_depend_on_threads(strobe, dtype):
    base = Case((200, 300, 260), (900, 800, 1000), dtype, 32, heads=4, heads_k=2, layout="paged", page_size=16)
    inputs = share_pages(make_inputs(replace(base, causal=True)), [(1, 0, 40), (2, 0, 30)])
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3, 7, 2):
            torch.set_num_threads(n)
            leaves = [t.detach().requires_grad_() for t in (inputs.q, inputs.k, inputs.v)]
            results.append(torch.autograd.grad(run(strobe, inputs, *leaves), leaves, inputs.dout))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))
