"""FlashAttention 3's drop-in on CUDA tensors, and both dialects of FlexHeadFA's Hopper module."""

import dataclasses
import types

import generator
import oracle
import torch
from fronts import check_gradients, check_results, described
from scenario import Skip, ints, qkv, randn, same_bits, scenario

import cache_cases
import reference

MASK = dict(causal=True, window_size=(40, 0))


@scenario([dict(d=64, dv=64), dict(d=64, dv=128), dict(d=128, dv=128)])
def dense(strobe, d, dv):
    import flash_attn_interface as fa3

    q, k, v = qkv(170, (8, 2, 2), (d, dv), grad=True)
    sinks = torch.randn(8, device="cuda")
    tensors, dout = [x.detach() for x in (q, k, v)], randn(2, 170, 8, dv)
    for more in (dict(softcap=3.0), dict(sinks=sinks)):
        out, lse = fa3.flash_attn_func(q, k, v, None, **MASK, **more, return_attn_probs=True)
        call = described(*tensors, causal=True, window=(40, 0), **more)
        check_results(call, out, lse)
        check_gradients(call, torch.autograd.grad(out, (q, k, v), dout), dout)
    # The plain call, which goes to Strobe's own at once, and hints about speed: the same bits.
    plain = fa3.flash_attn_func(q, k, v, **MASK, deterministic=True)
    hinted = fa3.flash_attn_func(q, k, v, **MASK, deterministic=True, num_splits=2, pack_gqa=True, sm_margin=4)
    same_bits(plain, hinted)
    check_results(described(*tensors, causal=True, window=(40, 0)), plain)


@scenario()
def packed_qkv(strobe):
    import flash_attn_interface as fa3

    q, k, v = qkv(150, (4, 4, 4))
    expected = fa3.flash_attn_func(q, k, v, causal=True)
    same_bits(fa3.flash_attn_qkvpacked_func(torch.stack((q, k, v), 2), causal=True), expected)
    q, k, v = qkv(150, (4, 2, 2))
    expected = fa3.flash_attn_func(q, k, v, causal=True)
    same_bits(fa3.flash_attn_qkvpacked_func(torch.cat((q, k, v), 2), causal=True, num_heads_q=4), expected)


@scenario()
def packed_with_used_lengths(strobe):
    import flash_attn_interface as fa3

    q, k, v = (randn(400, heads, 64).requires_grad_() for heads in (4, 2, 2))
    lens_q, lens_k = [100, 180], [150, 240]
    out, lse = fa3.flash_attn_varlen_func(
        q, k, v, ints(0, 150, 400), ints(0, 155, 400), 250, 245, ints(*lens_q), ints(*lens_k), **MASK,
        return_attn_probs=True,
    )  # fmt: skip
    rows_q, rows_k = (torch.cat([torch.arange(a, a + n) for a, n in pairs]).cuda()
                      for pairs in (zip((0, 150), lens_q), zip((0, 155), lens_k)))  # fmt: skip
    call = described(q.detach()[rows_q], k.detach()[rows_k], v.detach()[rows_k], lens_q, lens_k,
                     causal=True, window=(40, 0))  # fmt: skip
    check_results(call, out[rows_q], lse[:, rows_q])
    unused = torch.ones(400, dtype=torch.bool, device="cuda").index_fill(0, rows_q, False)
    assert out[unused].abs().max() == 0 and (lse[:, unused] == -float("inf")).all()
    dout = randn(400, 4, 64)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), dout)
    assert dq[unused].abs().max() == 0
    check_gradients(call, (dq[rows_q], dk[rows_k], dv[rows_k]), dout[rows_q])


@scenario([dict(layout=name) for name in ("dense", "packed", "paged", "cache")])
def qv_adds_its_scores(strobe, layout):
    import flash_attn_interface as fa3

    q, k, v = qkv(130, (4, 2, 2), (64, 128))
    qv = randn(2, 130, 4, 128)
    more = dict(causal=True)
    if layout == "dense":
        out, lse = fa3.flash_attn_func(q, k, v, qv=qv, **more, return_attn_probs=True)
    elif layout == "packed":
        cu, flat = ints(0, 130, 260), [x.flatten(0, 1) for x in (q, k, v, qv)]
        out, lse = fa3.flash_attn_varlen_func(
            *flat[:3], cu, cu, 130, 130, qv=flat[3], **more, return_attn_probs=True
        )  # fmt: skip
        out, lse = out.unflatten(0, (2, 130)), lse.unflatten(1, (2, 130)).transpose(0, 1)
    else:
        if layout == "paged":
            pages = [torch.nn.functional.pad(x, (0, 0, 0, 0, 0, 14)).view(18, 16, 2, -1) for x in (k, v)]
            more |= dict(page_table=torch.arange(18, device="cuda").int().view(2, 9))
        pages = pages if layout == "paged" else (k, v)
        out, lse, *_ = fa3.flash_attn_with_kvcache(
            q, *pages, qv=qv, cache_seqlens=ints(130, 130), **more, return_softmax_lse=True
        )  # fmt: skip
    wide = torch.cat((q, qv), -1), torch.cat((k, v), -1), v
    check_results(described(*wide, scale=192**-0.5, causal=True), out, lse)


def _chunked(sq, sk, chunk, **mask):
    at = torch.arange(sq, device="cuda")[:, None] + sk - sq
    j = torch.arange(sk, device="cuda")[None]
    with torch.device("cuda"):
        return oracle.visible(sq, sk, **mask) & (at // chunk == j // chunk)


@scenario([dict(sq=sq, sk=sk, window=w) for sq, sk in ((200, 200), (50, 290), (1, 130)) for w in ((-1, -1), (30, 0))])
def attention_chunk(strobe, sq, sk, window):
    import flash_attn_interface as fa3

    q = randn(2, sq, 4, 64).requires_grad_()
    k, v = (randn(2, sk, 2, 64).requires_grad_() for _ in range(2))
    call = dict(causal=True, window_size=window, attention_chunk=64)
    out, lse = fa3.flash_attn_func(q, k, v, **call, return_attn_probs=True)
    mask = _chunked(sq, sk, 64, causal=True, window=window)
    expected = described(*(x.detach() for x in (q, k, v)), masks=[mask, mask])
    check_results(expected, out, lse)
    dout = randn(*out.shape)
    check_gradients(expected, torch.autograd.grad(out, (q, k, v), dout), dout)
    with torch.no_grad():
        check_results(expected, fa3.flash_attn_with_kvcache(q, k, v, **call))
    lens_q, lens_k = [sq, sq], [sk, sk]
    flat = [x.detach().flatten(0, 1) for x in (q, k, v)]
    packed = fa3.flash_attn_varlen_func(*flat, ints(0, sq, 2 * sq), ints(0, sk, 2 * sk), sq, sk, **call)
    check_results(described(*flat, lens_q, lens_k, masks=[mask, mask]), packed)


@scenario([dict(group=n) for n in range(4)])
def generated_cache_calls(strobe, group):
    """The suite's own calls with a KV cache, in FlashAttention 3's words."""
    import flash_attn_interface as fa3

    def in_fa3_words(*args, alibi_slopes, block_table, out, **kwargs):
        assert alibi_slopes is None
        result, lse, *_ = fa3.flash_attn_with_kvcache(*args, page_table=block_table, **kwargs)
        return out.copy_(result), lse.masked_fill(lse == -float("inf"), float("inf"))

    functions = types.SimpleNamespace(flash_attn_with_kvcache=in_fa3_words)
    for job in generator.cache_groups()[group][::2]:
        case = dataclasses.replace(job.case, alibi=None)
        with torch.device("cuda"):
            cache_cases.check(functions, oracle.cache_inputs(case, job.seed, "cuda"))


@scenario([dict(captured=False), dict(captured=True)])
def ragged_queries_and_new_keys(strobe, captured):
    """Packed queries and packed new keys, turned by rotary, into pages that cache_batch_idx picks."""
    import flash_attn_interface as fa3

    used, new, queries, rows = [170, 40, 300], [3, 1, 20], [2, 50, 1], [4, 0, 2]
    table = torch.randperm(100, device="cuda").int().view(5, 20)
    caches = [randn(100, 16, 2, 64) for _ in "kv"]
    q, fresh = randn(sum(queries), 4, 64), [randn(sum(new), 2, 64) for _ in "kv"]
    angle = torch.outer(torch.arange(400.0), 100.0 ** -torch.linspace(0, 1, 16)).cuda()
    cos, sin = angle.cos().bfloat16(), angle.sin().bfloat16()
    keys = [[c[table[row].long()].flatten(0, 1)[:n] for c in caches] for row, n in zip(rows, used, strict=True)]
    before = [c.clone() for c in caches]

    def run():
        return fa3.flash_attn_with_kvcache(
            q, *caches, *fresh, rotary_cos=cos, rotary_sin=sin, rotary_interleaved=False, cache_seqlens=lengths,
            page_table=table, cache_batch_idx=places, cu_seqlens_q=cu_q, cu_seqlens_k_new=cu_new, max_seqlen_q=50,
            causal=True, return_softmax_lse=True,
        )  # fmt: skip

    lengths, places, cu_q, cu_new = ints(*used), ints(*rows), ints(0, 2, 52, 53), ints(0, 3, 4, 24)
    out, lse, *_ = run()
    if captured:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out, lse, *_ = run()
        for cache, old in zip(caches, before, strict=True):
            cache.copy_(old)
        graph.replay()
    turned_q, all_k, all_v, at_q, at_new = [], [], [], 0, 0
    with torch.device("cuda"):
        for (k, v), n, m, rows_q in zip(keys, used, new, queries, strict=True):
            turned_q.append(reference.rotary(q[at_q : at_q + rows_q], cos, sin, n + torch.arange(rows_q), False))
            added = [x[at_new : at_new + m] for x in fresh]
            all_k.append(torch.cat((k, reference.rotary(added[0], cos, sin, n + torch.arange(m), False))))
            all_v.append(torch.cat((v, added[1])))
            at_q, at_new = at_q + rows_q, at_new + m
    lens_k = [n + m for n, m in zip(used, new, strict=True)]
    call = described(torch.cat(turned_q), torch.cat(all_k), torch.cat(all_v), queries, lens_k, causal=True)
    check_results(call, out)
    for row, k, v in zip(rows, all_k, all_v, strict=True):
        stored = [c[table[row].long()].flatten(0, 1)[: len(k)] for c in caches]
        torch.testing.assert_close(stored[0], k, atol=2e-2, rtol=2e-2)  # turned in another order of rounding
        same_bits(stored[1], v)


@scenario()
def combine(strobe):
    import flash_attn_interface as fa3

    q, k, v = qkv(190)
    cuts = ((0, 70), (70, 70), (70, 190))
    parts = [fa3.flash_attn_func(q, k[:, a:b], v[:, a:b], return_attn_probs=True) for a, b in cuts]
    outs, lses = torch.stack([p[0] for p in parts]).float(), torch.stack([p[1].transpose(1, 2) for p in parts])
    outs[1] = float("nan")  # no key, no weight
    out, lse = fa3.flash_attn_combine(outs, lses, out_dtype=torch.bfloat16)
    check_results(described(q, k, v), out, lse.transpose(1, 2).contiguous())
    whole = fa3.flash_attn_combine(outs, lses)[0]
    same_bits(torch.ops.flash_attn_3.fwd_combine(outs, lses, None, None)[0], whole)


@scenario()
def operators(strobe):
    import flash_attn_interface as fa3

    q, k, v = qkv(130, grad=True)
    call = described(*(x.detach() for x in (q, k, v)), causal=True, window=(40, 0))
    out, lse, *_ = fa3._flash_attn_forward(q, k, v, causal=True, window_size_left=40)
    check_results(call, out, lse)
    dout = randn(*out.shape)
    check_gradients(call, torch.autograd.grad(out, (q, k, v), dout), dout)
    ops, buffer = torch.ops.flash_attn_3, torch.empty_like(out)
    with torch.no_grad():
        ops.fwd(q, k, v, out=buffer, is_causal=True, window_size_left=40)
        same_bits(buffer, out)
        gradients = [torch.empty_like(x) for x in (q, k, v)]
        ops.bwd(dout, q, k, v, out, lse, *gradients, is_causal=True, window_size_left=40, softmax_scale=None)
    check_gradients(call, gradients, dout)
    metadata = ops.get_scheduler_metadata(2, 1, 30, 4, 2, 64, 64, torch.bfloat16, ints(2, 3))
    assert metadata.is_cuda and metadata.dtype == torch.int32


ENGINES = ((None, None), ("sm80", "sm80"), ("sm90", "sm80"), ("sm80", "sm90"))


@scenario([dict(forward=f, backward=b) for f, b in ENGINES])
def forward_on_one_engine_backward_on_another(strobe, forward, backward):
    """FlexHeadFA's reason for its Hopper module: dqk != dv, the forward pass of one engine, the backward of another."""
    import flash_attn_interface as fa3

    engines = dict(forward_backend=forward, backward_backend=backward)
    if "sm90" in (forward, backward) and torch.cuda.get_device_capability() != (9, 0):
        raise Skip("no sm_90 GPU")
    q, k, v = qkv(200, (8, 4, 4), (64, 128), grad=True)
    inputs, dout = (q, k, v), randn(2, 200, 8, 128)
    call = described(*(x.detach() for x in inputs), causal=True, scale=0.15)
    out = fa3.flash_attn_f3b2_func(*inputs, 0.15, True, True, **engines)
    check_results(call, out)
    check_gradients(call, torch.autograd.grad(out, inputs, dout), dout)
    flat, cu = [x.detach().flatten(0, 1).requires_grad_() for x in inputs], ints(0, 200, 400)
    out, lse = fa3.flash_attn_f3b2_varlen_func(*flat, cu, cu, 200, 200, 0.15, True, False, **engines)
    check_results(call, out.view(2, 200, 8, 128), lse.unflatten(1, (2, 200)).transpose(0, 1))
    gradients = torch.autograd.grad(out, flat, dout.flatten(0, 1))
    check_gradients(call, [g.unflatten(0, (2, 200)) for g in gradients], dout)
