"""The call that vLLM makes of its flash attention, made of Strobe's."""

import json
import pathlib

import pytest
import torch
from dense import attend, check

from strobe.vllm.call import flash_attn_varlen_func

H, HK, D, BLOCK, SCALE = 6, 2, 40, 16, 0.17
ROWS, KEYS = [1, 37, 5, 1], [70, 37, 50, 13]  # decoding, a whole prompt, a chunk of one, decoding
RECORDED = json.loads((pathlib.Path(__file__).parent / "interface.json").read_text())


def batch(dtype=torch.float32):
    """A cache with K and V in axis 1, and the tensors of one mixed batch; K and V of each sequence."""
    cache = torch.full((40, 2, BLOCK, HK, D), float("nan"), dtype=dtype)
    pages = torch.randperm(40).tolist()
    table = torch.full((4, 9), -1, dtype=torch.int32)
    keys, values = [], []
    for n, length in enumerate(KEYS):
        k, v = torch.randn(2, length, HK, D).to(dtype)
        for at in range(0, length, BLOCK):
            page = pages.pop()
            table[n, at // BLOCK] = page
            for axis, x in enumerate((k, v)):
                part = x[at : at + BLOCK]
                cache[page, axis, : part.shape[0]] = part
        keys.append(k)
        values.append(v)
    return cache, table, keys, values


def call(cache, table, q, **options):
    key_cache, value_cache = cache.unbind(1)
    assert not key_cache.is_contiguous() and key_cache.stride(0) == 2 * BLOCK * HK * D
    return (
        dict(
            q=q,
            k=key_cache,
            v=value_cache,
            cu_seqlens_q=torch.tensor([0, *torch.tensor(ROWS).cumsum(0)], dtype=torch.int32),
            max_seqlen_q=max(ROWS),
            seqused_k=torch.tensor(KEYS, dtype=torch.int32),
            max_seqlen_k=max(KEYS),
            softmax_scale=SCALE,
            causal=True,
            block_table=table,
        )
        | options
    )


def expected(q, keys, values, **options):
    parts = [attend(q_, k, v, SCALE, **options) for q_, k, v in zip(q.split(ROWS), keys, values)]
    return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts], 1)


@pytest.mark.parametrize("version", [v for v in RECORDED if len(RECORDED[v]["calls"]) == 4])
@pytest.mark.parametrize("window", [None, 1, 20])
def test_the_exact_keywords_of_vllm(version, window):
    cache, table, keys, values = batch()
    q = torch.randn(sum(ROWS), H, D)
    out = torch.empty_like(q)
    scale = torch.tensor(1.0).expand(len(ROWS), HK)
    given = call(
        cache, table, q, out=out, alibi_slopes=None, window_size=[-1, -1] if window is None else [window - 1, 0],
        softcap=0, scheduler_metadata=torch.zeros(1 + 4 * 4, dtype=torch.int32), fa_version=3, q_descale=scale,
        k_descale=scale, v_descale=scale, num_splits=32, s_aux=None, dynamic_causal=None, mask_mod=None,
        aux_tensors=None,
    )  # fmt: skip
    names = RECORDED[version]["calls"]["FlashAttentionImpl.forward: flash_attn_varlen_func"]
    result = flash_attn_varlen_func(**{name.rstrip("="): given[name.rstrip("=")] for name in names})
    assert result is out
    check(out, expected(q, keys, values, window=window)[0])


def test_vllm_s_order_of_positions_and_its_lse():
    cache, table, keys, values = batch()
    q = torch.randn(sum(ROWS), H, D)
    c = call(cache, table, q)
    first = [c.pop(name) for name in ("q", "k", "v", "max_seqlen_q", "cu_seqlens_q", "max_seqlen_k")]
    out, lse = flash_attn_varlen_func(*first, **c, return_softmax_lse=True)
    reference = expected(q, keys, values)
    check(out, reference[0])
    assert lse.dtype == torch.float32 and lse.shape == (H, sum(ROWS))
    check(lse, reference[1])


def test_full_attention_in_decoding_is_decided_for_each_sequence():
    cache, table, keys, values = batch()
    q = torch.randn(sum(ROWS), H, D)
    mask = dict(keep_first=3, force_fa_decode=True)
    out = flash_attn_varlen_func(**call(cache, table, q, window_size=[7, 0], **mask))
    check(out, expected(q, keys, values, window=8, **mask)[0])
    windowed = flash_attn_varlen_func(**call(cache, table, q, window_size=[7, 0], keep_first=3))
    assert (out != windowed).flatten(1).any(1).tolist() == [True] + [False] * 42 + [True]


def test_sinks_softcap_and_alibi():
    cache, table, keys, values = batch()
    q = torch.randn(sum(ROWS), H, D)
    sinks, slopes = torch.randn(H), torch.rand(H)
    out = flash_attn_varlen_func(**call(cache, table, q, s_aux=sinks, softcap=5.0, alibi_slopes=slopes, fa_version=4))
    check(out, expected(q, keys, values, sinks=sinks, softcap=5.0, alibi_slopes=slopes)[0])


@pytest.mark.parametrize("given", ["out", None])
def test_rows_behind_the_last_sequence(given):
    """A full CUDA graph's batch is longer than its sequences; its last sequences are empty."""
    cache, table, keys, values = batch(torch.bfloat16)
    q = torch.randn(sum(ROWS) + 4, H, D).bfloat16()
    c = call(cache, torch.cat([table, 0 * table[:2]]), q)
    c["cu_seqlens_q"] = torch.cat([c["cu_seqlens_q"], c["cu_seqlens_q"][-1:].expand(2)])
    c["seqused_k"] = torch.cat([c["seqused_k"], torch.zeros(2, dtype=torch.int32)])
    out = torch.full_like(q, 7.0) if given else None
    result = flash_attn_varlen_func(**c, out=out)
    assert given is None or result is out
    check(result[: sum(ROWS)], expected(q[: sum(ROWS)], keys, values)[0])
    assert not result[sum(ROWS) :].any()


def test_without_pages():
    k, v = torch.randn(2, 46, HK, D)
    q = torch.randn(43, H, D)
    cu_q, cu_k = (torch.tensor([0, *x], dtype=torch.int32) for x in ([1, 43], [4, 46]))
    out = flash_attn_varlen_func(q, k, v, 42, cu_q, 42, cu_seqlens_k=cu_k, softmax_scale=SCALE, causal=True)
    parts = [attend(q[:1], k[:4], v[:4], SCALE), attend(q[1:], k[4:], v[4:], SCALE)]
    check(out, torch.cat([out for out, _ in parts]))


@pytest.mark.parametrize(
    "name, value",
    [
        ("q_v", torch.zeros(1)),
        ("output_scale", torch.ones(1)),
        ("mask_mod", print),
        ("aux_tensors", [torch.zeros(1)]),
        ("dynamic_causal", torch.ones(4)),
        ("block_sparse_tensors", (torch.zeros(1),)),
        ("aux_tensor_leading_dims", [0]),
        ("cp_tot_seqused_k", torch.ones(4)),
        ("cp_world_size", 2),
        ("return_attn_probs", True),
        ("gather_kv_indices", torch.zeros(1)),
        ("gather_kv_valid_length", torch.zeros(1)),
    ],
)
def test_what_strobe_does_not_have_is_refused_by_name(name, value):
    cache, table, *_ = batch()
    q = torch.randn(sum(ROWS), H, D)
    with pytest.raises(NotImplementedError, match=f"{name}$"):
        flash_attn_varlen_func(**call(cache, table, q), **{name: value})


def test_arguments_that_contradict_each_other():
    cache, table, *_ = batch()
    q = torch.randn(sum(ROWS), H, D)
    with pytest.raises(ValueError, match="one of cu_seqlens_k and seqused_k"):
        flash_attn_varlen_func(**call(cache, table, q, cu_seqlens_k=torch.zeros(5, dtype=torch.int32)))
    with pytest.raises(ValueError, match="block_table and seqused_k are given together"):
        flash_attn_varlen_func(**call(cache, None, q))
    with pytest.raises(ValueError, match="fa_version is 1"):
        flash_attn_varlen_func(**call(cache, table, q, fa_version=1))


def test_fp8_is_refused():
    cache, table, *_ = batch(torch.bfloat16)
    q = torch.randn(sum(ROWS), H, D).bfloat16()
    with pytest.raises((TypeError, ValueError, NotImplementedError)):
        flash_attn_varlen_func(**call(cache.to(torch.float8_e4m3fn), table, q))
