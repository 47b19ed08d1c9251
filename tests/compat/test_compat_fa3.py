"""flash_attn_interface: FlashAttention 3's calls and its operators."""

import flash_attn_3.flash_attn_interface as package
import flash_attn_interface as fa3
import pytest
import torch
from oracle import check, check_both, check_gradients, dense, lengths, offsets, packed, sequence, tensors

INF = float("inf")
MASK = dict(causal=True, window=(6, 0))


def no_sentinel(lse):
    """The oracle's +inf of an empty row as FlashAttention 3's -inf."""
    return lse.masked_fill(lse == INF, -INF)


def test_dense_with_gradients():
    q, k, v = tensors(2, 9, 13, 4, 2, 16, 24, grad=True)
    out, lse = fa3.flash_attn_func(q, k, v, None, True, window_size=(6, 0), softcap=3.0, return_attn_probs=True)

    def compute(*x):
        return dense(*x, softcap=3.0, **MASK)

    check_both((out, lse), compute, q, k, v)
    dout = torch.randn_like(out)
    check_gradients(torch.autograd.grad(out, (q, k, v), dout), compute, q, k, v, dout)
    assert package.flash_attn_func is fa3.flash_attn_func


def test_qkvpacked_both_layouts():
    q, k, v = tensors(2, 9, 9, 4, 4)
    expected = fa3.flash_attn_func(q, k, v, causal=True)
    assert torch.equal(fa3.flash_attn_qkvpacked_func(torch.stack((q, k, v), 2), causal=True), expected)
    q, k, v = tensors(2, 9, 9, 4, 2)
    expected = fa3.flash_attn_func(q, k, v, causal=True)
    assert torch.equal(fa3.flash_attn_qkvpacked_func(torch.cat((q, k, v), 2), causal=True, num_heads_q=4), expected)
    with pytest.raises(ValueError, match="num_heads_q"):
        fa3.flash_attn_qkvpacked_func(torch.cat((q, k, v), 2))


def test_varlen_with_seqused():
    q, k, v = tensors(None, 15, 18, grad=True)
    cu_q, cu_k = offsets([5, 10]), offsets([8, 10])
    used_q, used_k = lengths(4, 7), lengths(8, 9)
    out, lse = fa3.flash_attn_varlen_func(
        q, k, v, cu_q, cu_k, 10, 10, used_q, used_k, causal=True, window_size=(6, 0), return_attn_probs=True
    )

    def compute(q, k, v):
        a = sequence(q[:4], k[:8], v[:8], **MASK)
        b = sequence(q[5:12], k[8:17], v[8:17], **MASK)
        zero, empty = q.new_zeros(3, 4, 16), q.new_full((4, 3), -INF)
        return (
            torch.cat((a[0], zero[:1], b[0], zero)),
            torch.cat((a[1], empty[:, :1], b[1], empty), 1),
        )

    check_both((out, lse), compute, q, k, v)
    dout = torch.randn_like(out)
    check_gradients(torch.autograd.grad(out, (q, k, v), dout), compute, q, k, v, dout)


@pytest.mark.parametrize("layout", ["dense", "packed", "paged", "decode"])
def test_qv_adds_its_scores(layout):
    d, dv = 16, 40
    q, k, v = tensors(2, 9, 13, 4, 2, d, dv)
    qv = torch.randn(2, 9, 4, dv)
    wide = (torch.cat((q, qv), -1), torch.cat((k, v), -1), v)

    def compute(*x):
        return dense(*x, scale=(d + dv) ** -0.5, causal=True)

    if layout == "dense":
        result = fa3.flash_attn_func(q, k, v, qv=qv, causal=True, return_attn_probs=True)
    elif layout == "packed":
        flat = [x.flatten(0, 1) for x in (q, k, v)]
        out, lse = fa3.flash_attn_varlen_func(
            *flat, offsets([9, 9]), offsets([13, 13]), 9, 13, qv=qv.flatten(0, 1), causal=True, return_attn_probs=True
        )
        result = out.unflatten(0, (2, 9)), lse.unflatten(1, (2, 9)).transpose(0, 1)
    elif layout == "paged":
        table = lengths(1, 0)[:, None]
        pages = k.flip(0).contiguous(), v.flip(0).contiguous()
        result = fa3.flash_attn_with_kvcache(
            q, *pages, qv=qv, page_table=table, cache_seqlens=lengths(13, 13), causal=True, return_softmax_lse=True
        )
    else:
        result = fa3.flash_attn_with_kvcache(q, k, v, qv=qv, causal=True, return_softmax_lse=True)
    check_both(result, compute, *wide)


CHUNK = dict(causal=True, chunk=8)


@pytest.mark.parametrize("sq,sk", [(20, 20), (5, 29), (1, 17), (1, 16), (20, 7), (9, 64)])
@pytest.mark.parametrize("mask", [dict(causal=True), dict(causal=True, window=(3, 0)), dict(), dict(window=(2, 4))],
                         ids=str)  # fmt: skip
def test_attention_chunk(sq, sk, mask):
    q, k, v = tensors(2, sq, sk, grad=True)
    call = dict(causal=mask.get("causal", False), window_size=mask.get("window", (-1, -1)), attention_chunk=8)
    result = fa3.flash_attn_func(q, k, v, **call, return_attn_probs=True)

    def compute(*x):
        out, lse = dense(*x, **mask, chunk=8)
        return out, no_sentinel(lse)

    check_both(result, compute, q, k, v)
    dout = torch.randn_like(result[0])
    check_gradients(torch.autograd.grad(result[0], (q, k, v), dout), compute, q, k, v, dout)
    with torch.no_grad():
        cached = fa3.flash_attn_with_kvcache(q, k, v, **call)
    assert torch.equal(cached, result[0])


def test_attention_chunk_packed_and_paged():
    lens_q, lens_k = [20, 1, 6], [20, 17, 30]
    q, k, v = tensors(None, 27, 67)
    cu_q = offsets(lens_q)
    result = fa3.flash_attn_varlen_func(
        q, k, v, cu_q, offsets(lens_k), 20, 30, causal=True, attention_chunk=8, return_attn_probs=True
    )
    check_both(result, lambda *x: packed(*x, lens_q, lens_k, **CHUNK), q, k, v)
    table = torch.randperm(24).int().reshape(3, 8)
    pages = [torch.full((24, 4, 2, 16), float("nan")) for _ in "kv"]
    for x, store in zip((k, v), pages, strict=True):
        for b, rows in enumerate(x.split(lens_k)):
            for j, row in enumerate(rows):
                store[table[b, j // 4], j % 4] = row
    cached = fa3.flash_attn_with_kvcache(
        q, *pages, page_table=table, cache_seqlens=lengths(*lens_k), cu_seqlens_q=cu_q, max_seqlen_q=20, causal=True,
        attention_chunk=8, return_softmax_lse=True,
    )  # fmt: skip
    assert torch.equal(cached[0], result[0]) and torch.equal(cached[1], result[1])


@pytest.mark.parametrize("option", [dict(keep_first=2), dict(force_fa_decode=True), dict(full_from=1)], ids=str)
def test_attention_chunk_refuses_what_it_cannot_mean(option):
    q, k, v = tensors(1, 9, 9)
    with pytest.raises(NotImplementedError, match=f"{next(iter(option))} with attention_chunk"):
        fa3.flash_attn_func(q, k, v, window_size=(3, 0), attention_chunk=4, **option)


def cache_case(paged, packed_q, packed_new, batch_idx, leftpad, rotary, causal=True):
    """The caches, the call, and each sequence's keys after it; everything not in use is NaN."""
    used, new, queries = [17, 4, 30], [3, 1, 2] if packed_new else [3] * 3, [2, 5, 1] if packed_q else [2] * 3
    pads = [2, 0, 5] if leftpad else [0] * 3
    rows = [4, 0, 2] if batch_idx else [0, 1, 2]
    size = 5 if paged else 40
    table = torch.full((5, 9), -1, dtype=torch.int32)
    for b, row in enumerate(rows):
        table[row, : -(-(used[b] + new[b]) // size)] = torch.arange(9 * b, 9 * b + 9)[: -(-(used[b] + new[b]) // size)]
    caches = [torch.full((27, size, 2, 16) if paged else (5, size, 2, 16), float("nan")) for _ in "kv"]
    q = torch.randn(sum(queries), 4, 16)
    fresh = [torch.randn(sum(new), 2, 16) for _ in "kv"]
    whole = []
    for b, n in enumerate(used):
        keys = [torch.randn(n, 2, 16) for _ in "kv"]
        for cache, x in zip(caches, keys, strict=True):
            for j in range(n):
                if paged:
                    cache[table[rows[b], j // size], j % size] = x[j]
                else:
                    cache[rows[b], j] = x[j]
        whole.append(keys)
    call = dict(cache_seqlens=lengths(*used), causal=causal)
    if paged:
        call["page_table"] = table if batch_idx else table[:3]
    if batch_idx:
        call["cache_batch_idx"] = lengths(*rows)
    if leftpad:
        call["cache_leftpad"] = lengths(*pads)
    if packed_q:
        call |= dict(cu_seqlens_q=offsets(queries), max_seqlen_q=5)
    if packed_new:
        call["cu_seqlens_k_new"] = offsets(new)
    base = used
    if rotary:
        angle = torch.outer(torch.arange(64.0), 100.0 ** -torch.linspace(0, 1, 8))
        call |= dict(rotary_cos=angle.cos(), rotary_sin=angle.sin(), rotary_interleaved=rotary == "interleaved")
        if rotary == "interleaved":
            base = [11, 3, 8]
            call["rotary_seqlens"] = lengths(*base)

    def turn(x, positions):
        if not rotary:
            return x
        import reference

        return reference.rotary(x, call["rotary_cos"], call["rotary_sin"], positions, rotary == "interleaved")

    parts = []
    for b, (rows_q, *added) in enumerate(zip(q.split(queries), *(x.split(new) for x in fresh), strict=True)):
        i = torch.arange(queries[b]) if causal else torch.zeros(queries[b], dtype=torch.long)
        k = torch.cat((whole[b][0], turn(added[0], base[b] + torch.arange(new[b]))))[pads[b] :]
        v = torch.cat((whole[b][1], added[1]))[pads[b] :]
        parts.append((turn(rows_q, base[b] + i), k, v))
    shape = (lambda x, n: x) if packed_q else (lambda x, n: x.unflatten(0, (3, n)))
    fresh = fresh if packed_new else [x.unflatten(0, (3, 3)) for x in fresh]
    return shape(q, 2), caches, fresh, call, parts


@pytest.mark.parametrize("leftpad", [False, True])
@pytest.mark.parametrize("rotary", [None, "halves", "interleaved"])
@pytest.mark.parametrize("packed_new", [False, True])
@pytest.mark.parametrize("packed_q", [False, True])
@pytest.mark.parametrize("batch_idx", [False, True])
@pytest.mark.parametrize("paged", [False, True])
def test_cache(paged, packed_q, packed_new, batch_idx, leftpad, rotary):
    for causal in (True, False):
        q, caches, new, call, parts = cache_case(paged, packed_q, packed_new, batch_idx, leftpad, rotary, causal)
        out, lse, *accumulators = fa3.flash_attn_with_kvcache(q, *caches, *new, **call, return_softmax_lse=True)
        assert len(accumulators) == 2 and all(x.numel() == 0 for x in accumulators)
        out = out if packed_q else out.flatten(0, 1)
        lse = lse if packed_q else lse.transpose(0, 1).flatten(1)
        at = 0
        for x in parts:
            rows = slice(at, at + len(x[0]))
            at += len(x[0])
            check_both((out[rows], lse[:, rows]), lambda *x, c=causal: sequence(*x, causal=c), *x)


def test_cache_refuses_new_keys_that_do_not_fit():
    q, k, v = tensors(1, 1, 8)
    new = torch.randn(2, 2, 16)
    call = dict(cu_seqlens_q=offsets([1]), cu_seqlens_k_new=offsets([2]), max_seqlen_q=1)
    with pytest.raises(ValueError, match="the cache holds 8 keys, the new ones end at 9"):
        fa3.flash_attn_with_kvcache(q[0], k, v, new, new, cache_seqlens=lengths(7), **call)
    with pytest.raises(ValueError, match="max_seqlen_q"):
        fa3.flash_attn_with_kvcache(q[0], k, v, cu_seqlens_q=offsets([1]))


def test_hints_are_checked_and_change_nothing():
    q, k, v = tensors(2, 1, 30)
    expected = fa3.flash_attn_with_kvcache(q, k, v, cache_seqlens=20)
    metadata = fa3.get_scheduler_metadata(2, 1, 30, 4, 2, 16, lengths(20, 20), causal=True, num_splits=3)
    assert metadata.dtype == torch.int32 and metadata.dim() == 1
    for hints in (
        dict(num_splits=4, pack_gqa=True, sm_margin=2),
        dict(scheduler_metadata=metadata),
        dict(pack_gqa=False),
    ):
        assert torch.equal(fa3.flash_attn_with_kvcache(q, k, v, cache_seqlens=20, **hints), expected)
    for wrong in (dict(num_splits=1.5), dict(pack_gqa=1), dict(sm_margin=None), dict(scheduler_metadata=q)):
        with pytest.raises(TypeError, match=next(iter(wrong))):
            fa3.flash_attn_with_kvcache(q, k, v, cache_seqlens=20, **wrong)
    with pytest.raises(ValueError, match="sm_margin is -1"):
        fa3.flash_attn_func(q, k, v, sm_margin=-1)


def test_fp8_and_its_factors_are_refused_by_name():
    q, k, v = tensors(1, 4, 4)
    small = [x.to(torch.float8_e4m3fn) for x in (q, k, v)]
    with pytest.raises(NotImplementedError, match="FP8 is not implemented, q is given"):
        fa3.flash_attn_func(*small)
    with pytest.raises(NotImplementedError, match="FP8 is not implemented, k_cache is given"):
        fa3.flash_attn_with_kvcache(q, *small[1:])
    for name in ("q_descale", "k_descale", "v_descale"):
        with pytest.raises(NotImplementedError, match=name):
            fa3.flash_attn_func(q, k, v, **{name: torch.ones(1, 2)})
        with pytest.raises(NotImplementedError, match=name):
            torch.ops.flash_attn_3.fwd(q, k, v, **{name: torch.ones(1, 2)})
    with pytest.raises(NotImplementedError, match="FP8"):
        fa3.get_scheduler_metadata(1, 1, 8, 4, 2, 16, lengths(8), qkv_dtype=torch.float8_e4m3fn)


def test_combine_of_parts_is_the_whole():
    q, k, v = tensors(2, 6, 30)
    parts = [fa3.flash_attn_func(q, k[:, a:b], v[:, a:b], return_attn_probs=True) for a, b in ((0, 7), (7, 7), (7, 30))]
    outs = torch.stack([p[0] for p in parts])
    lses = torch.stack([p[1].transpose(1, 2) for p in parts])
    outs[1] = float("nan")  # no key, no weight
    out, lse = fa3.flash_attn_combine(outs, lses)
    check(out, lambda *x: dense(*x)[0], q, k, v)
    check(lse.transpose(1, 2), lambda *x: dense(*x)[1], q, k, v, "lse")
    assert lse.shape == (2, 6, 4) and lse.stride(1) == 1
    buffer = torch.empty(2, 6, 4, 16, dtype=torch.bfloat16)
    result, _ = fa3.flash_attn_combine(outs, lses, buffer, torch.bfloat16)
    assert result.data_ptr() == buffer.data_ptr() and torch.equal(buffer, out.bfloat16())
    empty, lse = fa3.flash_attn_combine(outs[1:2], lses[1:2])
    assert empty.abs().max() == 0 and lse.max() == -INF
    assert torch.equal(torch.ops.flash_attn_3.fwd_combine(outs, lses, None, None)[0], out)


@pytest.mark.parametrize("name", ["s_aux", "sinks", "learnable_sink"])
def test_learned_sinks_by_any_name(name):
    q, k, v = tensors(2, 9, 9)
    sinks = torch.randn(4)
    out = fa3.flash_attn_func(q, k, v, causal=True, **{name: sinks})
    check(out, lambda *x: dense(*x, causal=True, sinks=sinks)[0], q, k, v)


def test_operators_forward_and_backward():
    q, k, v = tensors(2, 9, 13, 4, 2, grad=True)
    out, lse, *rest = fa3._flash_attn_forward(q, k, v, causal=True, window_size_left=6)

    def compute(*x):
        return dense(*x, **MASK)

    check_both((out, lse), compute, q, k, v)
    dout = torch.randn_like(out)
    expected = torch.autograd.grad(out, (q, k, v), dout)
    check_gradients(expected, compute, q, k, v, dout)
    with torch.no_grad():
        buffer = torch.empty_like(out)
        assert torch.ops.flash_attn_3.fwd(q, k, v, out=buffer, is_causal=True, window_size_left=6)[0] is not None
        assert torch.equal(buffer, out)
        gradients = [torch.empty_like(x) for x in (q, k, v)]
        delta = torch.ops.flash_attn_3.bwd(
            dout, q, k, v, out, lse, *gradients, is_causal=True, window_size_left=6, softmax_scale=None
        )
        assert len(delta) == 5 and delta[0].shape == (2, 4, 128)
        for a, b in zip(gradients, expected, strict=True):
            assert torch.equal(a, b)
    torch.library.opcheck(
        torch.ops.flash_attn_3._flash_attn_forward.default, (q.detach(), k.detach(), v.detach()),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )  # fmt: skip
    metadata = torch.ops.flash_attn_3.get_scheduler_metadata(2, 1, 30, 4, 2, 16, 16, torch.bfloat16, lengths(2, 3))
    assert metadata.dtype == torch.int32


def test_compiled_without_graph_break():
    q, k, v = tensors(2, 9, 9)
    compiled = torch.compile(lambda *x: fa3.flash_attn_func(*x, causal=True), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), fa3.flash_attn_func(q, k, v, causal=True))
    compiled = torch.compile(lambda *x: fa3._flash_attn_forward(*x)[0], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), fa3.flash_attn_func(q, k, v))
