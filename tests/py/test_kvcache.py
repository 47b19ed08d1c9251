"""flash_attn_with_kvcache: appending, rotary, paging, left padding, batch indices; decoding equals prefill."""

from dataclasses import replace

import pytest
import torch

import cache_cases
from cache_cases import CacheCase, call, check, make_cache, same_bits

BASE = CacheCase((40, 7, 1), head_dim=32, head_dim_v=48)
CASES = [
    BASE,
    replace(BASE, seqlen_q=5, causal=True),
    replace(BASE, seqlen_new=1, causal=True),
    replace(BASE, seqlen_q=6, seqlen_new=6, causal=True, cached=(0, 33, 4)),
    replace(BASE, seqlen_q=2, seqlen_new=9),
    replace(BASE, batch_idx=True, seqlen_new=3),
    replace(BASE, leftpad=True, seqlen_new=2, seqlen_q=2, causal=True),
    replace(BASE, window=(5, 0), keep_first=2),
    replace(BASE, window=(5, 0), keep_first=2, force_fa_decode=True),
    replace(BASE, window=(5, 0), seqlen_q=4, full_from=2, causal=True),
    replace(BASE, softcap=2.0, sinks=True, alibi="bh"),
    replace(BASE, num_splits=4, cached=(700, 0, 300)),
    replace(BASE, heads=8, heads_k=1, heads_v=4, cached=(300, 2, 65)),
    replace(BASE, head_dim=192, head_dim_v=128, seqlen_new=1),
]


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cache(strobe, case, dtype):
    check(strobe, make_cache(replace(case, dtype=dtype)))


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("ordered", [dict(causal=True), dict(window=(9, -1)), dict()], ids=str)
@pytest.mark.parametrize("rotary_dim", [16, 32])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_rotary(strobe, interleaved, ordered, rotary_dim, dtype):
    change = dict(rotary_dim=rotary_dim, interleaved=interleaved, seqlen_q=3, seqlen_new=3, dtype=dtype)
    check(strobe, make_cache(replace(BASE, **change, **ordered)))
    check(strobe, make_cache(replace(BASE, **change, **ordered, leftpad=True, page_size=3)))


@pytest.mark.parametrize("page_size", [1, 3, 16, 256])
@pytest.mark.parametrize("change", [{}, dict(seqlen_q=3, seqlen_new=3, causal=True), dict(leftpad=True)], ids=str)
def test_paged(strobe, page_size, change):
    case = replace(BASE, page_size=page_size, cached=(40, 0 if change.get("seqlen_new") else 1, 300), **change)
    for dtype in ("fp32", "bf16"):
        check(strobe, make_cache(replace(case, dtype=dtype)))


@pytest.mark.parametrize("seqlens", [None, 17])
def test_cache_seqlens_absent_or_int(strobe, seqlens):
    length = 25 if seqlens is None else seqlens
    q, k, v = torch.randn(2, 1, 4, 16), torch.randn(2, 25, 2, 16), torch.randn(2, 25, 2, 16)
    k[:, length:] = float("nan")
    out = strobe.flash_attn_with_kvcache(q, k, v, cache_seqlens=seqlens)
    expected = strobe.flash_attn_func(q, k[:, :length], v[:, :length])
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("page_size", [None, 3])
@pytest.mark.parametrize("mask", [{}, dict(window_size=(6, 0), keep_first=2)], ids=str)
def test_decoding_step_by_step_equals_prefill(strobe, page_size, mask):
    batch, length, prefix = 2, 29, 11
    q = torch.randn(batch, length, 4, 32)
    k, v = torch.randn(batch, length, 2, 32), torch.randn(batch, length, 1, 48)
    expected, expected_lse, _ = strobe.flash_attn_func(q, k, v, causal=True, return_attn_probs=True, **mask)
    table, lead = None, (batch, length)
    if page_size:
        pages = -(-length // page_size)
        table = torch.randperm(batch * pages).to(torch.int32).view(batch, pages)
        lead = (batch * pages, page_size)
    k_cache, v_cache = torch.full((*lead, 2, 32), float("nan")), torch.full((*lead, 1, 48), float("nan"))
    steps = [(0, prefix), *((i, i + 1) for i in range(prefix, length))]
    for begin, end in steps:
        out, lse = strobe.flash_attn_with_kvcache(
            q[:, begin:end],
            k_cache,
            v_cache,
            k[:, begin:end],
            v[:, begin:end],
            cache_seqlens=torch.full((batch,), begin, dtype=torch.int32),
            block_table=table,
            causal=True,
            return_softmax_lse=True,
            **mask,
        )
        torch.testing.assert_close(out, expected[:, begin:end], rtol=2e-5, atol=2e-6)
        torch.testing.assert_close(lse, expected_lse[..., begin:end], rtol=2e-5, atol=2e-6)


def test_splits_change_nothing_but_rounding(strobe):
    inputs = make_cache(replace(BASE, cached=(900, 65, 3)))
    whole, lse = call(strobe, inputs, inputs.k_cache, inputs.v_cache, num_splits=1)
    for splits in (2, 7, 128):
        out, other = call(strobe, inputs, inputs.k_cache, inputs.v_cache, num_splits=splits)
        torch.testing.assert_close(out, whole, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(other, lse, rtol=1e-5, atol=1e-6)


def test_repeated_calls_have_the_same_bits(strobe):
    inputs = make_cache(replace(BASE, cached=(900, 65, 3), heads=8, heads_v=1))
    first = call(strobe, inputs, inputs.k_cache, inputs.v_cache)
    second = call(strobe, inputs, inputs.k_cache, inputs.v_cache)
    assert all(same_bits(a, b) for a, b in zip(first, second, strict=True))


def test_oracle_append_places_rows():
    inputs = make_cache(replace(BASE, cached=(4, 2, 0), seqlen_new=2, page_size=3))
    _, _, k_cache, _ = cache_cases.oracle(inputs, torch.float32)
    page, row = divmod(5, 3)
    torch.testing.assert_close(k_cache[inputs.page_table[0, page], row], inputs.k[0, 1])
