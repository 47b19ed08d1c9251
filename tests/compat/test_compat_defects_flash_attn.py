"""What goes wrong in FlashAttention 2 and 3 and in vLLM's fork, one test each."""

import subprocess
import sys

import flash_attn
import flash_attn_interface as fa3
import flash_attn_vllm
import pytest
import torch
from flash_attn.flash_attn_interface import _flash_attn_varlen_forward
from oracle import BF16, check, check_both, check_gradients, dense, lengths, offsets, packed, sequence, tensors
from test_compat_defects_swaa import paged

INF = float("inf")


def test_lse_of_paged_decoding_is_not_transposed():
    lens = [90, 33]
    q, k, v = tensors(None, 2, 123, 6, 2, 32)
    pages_k, pages_v, table = paged(k, v, lens, 256)
    out, lse, _, _ = _flash_attn_varlen_forward(
        q, pages_k, pages_v, offsets([1, 1]), offsets(lens), 1, 90, 0.0, 0.2, True, block_table=table, num_splits=1
    )
    check_both((out, lse), lambda *x: packed(*x, [1, 1], lens, scale=0.2), q, k, v)


def test_lse_of_a_sequence_without_keys_corrupts_other_rows():
    lens_q, lens_k = [3, 130, 2], [40, 0, 7]
    q, k, v = tensors(None, 135, 47, 6, 2, 32)
    pages_k, pages_v, table = paged(k, v, lens_k, 16)
    out, lse, _, _ = _flash_attn_varlen_forward(
        q, pages_k, pages_v, offsets(lens_q), offsets(lens_k), 130, 40, 0.0, 0.2, False, block_table=table
    )
    assert (lse[:, 3:133] == INF).all() and lse[:, :3].isfinite().all() and lse[:, 133:].isfinite().all()
    check_both((out, lse), lambda *x: packed(*x, lens_q, lens_k, scale=0.2), q, k, v)


def test_out_of_packed_decoding_is_not_written():
    lens = [90, 33]
    q, k, v = tensors(None, 2, 123, 6, 2, 32)
    wide = torch.full((4, 6, 32), float("nan"))
    out = flash_attn.flash_attn_varlen_func(q, k, v, offsets([1, 1]), offsets(lens), 1, 90, out=wide[::2])
    assert out.data_ptr() == wide.data_ptr() and wide[1::2].isnan().all()
    check(wide[::2], lambda *x: packed(*x, [1, 1], lens)[0], q, k, v)


def test_paged_cache_calls_wait_for_the_device():
    """Traced into one graph: no value of a tensor is read on the way."""
    q, k, v = tensors(2, 1, 40)
    table, new = torch.arange(10).int().reshape(2, 5), torch.randn(2, 1, 2, 16)

    def call(q, k, v, used):
        return flash_attn.flash_attn_with_kvcache(
            q, k, v, new, new, cache_seqlens=used, block_table=table, causal=True, window_size=(9, 0)
        )

    pages = [x.reshape(10, 8, 2, 16) for x in (k, v)]
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    args = [x.clone() for x in pages]
    assert torch.equal(compiled(q, *args, lengths(20, 30)), call(q, *pages, lengths(20, 30)))
    assert all(torch.equal(a, b) for a, b in zip(args, pages, strict=True))


@pytest.mark.parametrize("size", [None, 16])
def test_appended_tokens_left_of_the_window_are_not_written(size):
    q, k, v = tensors(1, 1, 60)
    caches, call = [torch.full((1, 64, 2, 16), float("nan")) for _ in "kv"], {}
    if size:
        caches, call = [c.view(4, 16, 2, 16) for c in caches], dict(block_table=torch.arange(4).int()[None])
    out = flash_attn.flash_attn_with_kvcache(q, *caches, k, v, cache_seqlens=0, causal=True, window_size=(2, 0), **call)
    check(out, lambda *x: dense(*x, causal=True, window=(2, 0))[0], q, k, v)
    for cache, x in zip(caches, (k, v), strict=True):
        cache = cache.reshape(1, 64, 2, 16)
        assert torch.equal(cache[:, :60], x) and cache[:, 60:].isnan().all()


WHOLE_CACHE = """
import resource, torch, flash_attn
caches = [torch.empty(1, 2**25, 1, 20, dtype=torch.bfloat16) for _ in "kv"]  # 1.3 GiB each, hardly touched
q = torch.randn(1, 1, 1, 20).bfloat16()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
flash_attn.flash_attn_with_kvcache(q, *caches, q, q, cache_seqlens=5)
assert caches[0][0, 5].equal(q[0, 0]) and caches[1][0, 5].equal(q[0, 0])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_a_cache_of_odd_head_dim_is_copied_whole():
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}\n{WHOLE_CACHE}"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 300, f"{done.stdout} MiB more memory"


def test_lse_of_causal_alibi_is_shifted():
    q, k, v = tensors(2, 9, 13)
    slopes = torch.rand(4)
    result = flash_attn.flash_attn_func(q, k, v, causal=True, alibi_slopes=slopes, return_attn_probs=True)
    check_both(result, lambda *x: dense(*x, slopes=slopes, causal=True), q, k, v)


@pytest.mark.parametrize("packing", ["varlen", "kvpacked", "qkvpacked", "paged", "operator", "fa3"])
def test_rows_behind_the_last_sequence_are_left_as_they_were(packing):
    q, k, v = tensors(None, 12, 12, 4, 4)
    for x in (q, k, v):
        x[9:] = float("nan")
    cu = offsets([4, 5])
    call = (cu, cu, 5, 5)
    stacked = torch.stack((q, k, v), 1)
    if packing == "varlen":
        buffer = torch.full_like(q, float("nan"))
        out = flash_attn.flash_attn_varlen_func(q, k, v, *call, causal=True, out=buffer)
        assert out.data_ptr() == buffer.data_ptr()
    elif packing == "kvpacked":
        out = flash_attn.flash_attn_varlen_kvpacked_func(q, stacked[:, 1:], *call, causal=True)
    elif packing == "qkvpacked":
        out = flash_attn.flash_attn_varlen_qkvpacked_func(stacked, cu, 5, causal=True)
    elif packing == "paged":
        pages_k, pages_v, table = paged(k[:9], v[:9], [4, 5], 16)
        out = flash_attn.flash_attn_varlen_func(
            q, pages_k, pages_v, *call, causal=True, block_table=table, seqused_k=lengths(4, 5)
        )
    elif packing == "operator":
        out = _flash_attn_varlen_forward(q, k, v, *call, 0.0, 0.25, True)[0]
    else:
        out = fa3.flash_attn_varlen_func(q, k, v, *call, causal=True)
    assert out[9:].abs().max() == 0
    check(out[:9], lambda *x: packed(*x, [4, 5], [4, 5], causal=True)[0], *(x[:9] for x in (q, k, v)))


@pytest.mark.parametrize("operator", [False, True])
def test_rows_behind_the_last_sequence_have_no_probabilities(operator):
    q, k, v = tensors(None, 200, 200)
    cu = offsets([4, 5])
    if operator:
        results = _flash_attn_varlen_forward(q, k, v, cu, cu, 5, 5, 0.3, 0.25, True, return_softmax=True)
    else:
        results = flash_attn.flash_attn_varlen_func(q, k, v, cu, cu, 5, 5, 0.3, 0.25, True, return_attn_probs=True)
    out, probs = results[0], results[2]
    assert probs.shape == (2, 4, 128, 128)
    for b, rows in enumerate((slice(0, 4), slice(4, 9))):
        n = rows.stop - rows.start
        one = [x[rows] for x in (q, k, v)]
        keep = ~torch.signbit(probs[b, :, :n, :n])
        mask = dict(causal=True, scale=0.25, keep=keep, dropout_p=0.3)
        check(out[rows], lambda *x, m=mask: sequence(*x, **m)[0], *one)


@pytest.mark.parametrize("operator", [False, True])
def test_rows_behind_the_last_sequence_have_no_gradient(operator):
    q, k, v = tensors(None, 12, 12, grad=True)
    cu = offsets([4, 5])
    call = dict(cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=5, max_seqlen_k=5, causal=True)
    if operator:
        out = fa3._flash_attn_forward(q, k, v, **call)[0]
    else:
        out = flash_attn.flash_attn_varlen_func(q, k, v, **call)
    dout = torch.randn_like(out)
    gradients = torch.autograd.grad(out, (q, k, v), dout)
    assert all(g[9:].abs().max() == 0 for g in gradients)
    inputs = [x.detach()[:9] for x in (q, k, v)]
    whole = [g[:9] for g in gradients]
    check_gradients(whole, lambda *x: packed(*x, [4, 5], [4, 5], causal=True), *inputs, dout[:9])


@pytest.mark.parametrize("module", [flash_attn, fa3], ids=lambda m: m.__name__)
def test_offsets_of_long_sequences_overflow_32_bits(module):
    rows, stride = 140, 2**24
    storage = torch.empty(rows * stride, dtype=BF16)
    k = storage.as_strided((rows, 2, 64), (stride, 64, 1))
    k.copy_(torch.randn(k.shape))
    q = torch.randn(5, 2, 64, dtype=BF16)
    out = module.flash_attn_varlen_func(q, k, k, offsets([2, 3]), offsets([6, 134]), 3, 134, causal=True)
    near = k.contiguous()
    check(out, lambda *x: packed(*x, [2, 3], [6, 134], causal=True)[0], q, near, near)


def test_an_empty_row_has_another_lse_where_the_call_has_no_keys():
    q, k, v = tensors(1, 5, 3)
    out, lse = fa3.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    assert (lse[:, :, :2] == -INF).all() and lse[:, :, 2:].isfinite().all() and out[:, :2].abs().max() == 0
    out, lse = fa3.flash_attn_func(q, k[:, :0], v[:, :0], return_attn_probs=True)
    assert (lse == -INF).all() and out.abs().max() == 0
    out, lse, _ = flash_attn.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    assert (lse[:, :, :2] == INF).all()
    leaves = tensors(1, 5, 3, grad=True)
    out, lse, *_ = fa3._flash_attn_forward(*leaves, causal=True)
    check_gradients(
        torch.autograd.grad(out, leaves, torch.ones_like(out)), lambda *x: dense(*x, causal=True), *leaves,
        torch.ones_like(out),
    )  # fmt: skip


@pytest.mark.parametrize("which", ["q", "k", "both"])
def test_the_backward_ignores_seqused_without_cu_seqlens(which):
    q, k, v = tensors(2, 9, 13, grad=True)
    used_q = lengths(4, 7) if which != "k" else None
    used_k = lengths(13, 6) if which != "q" else None
    out, lse, *_ = fa3._flash_attn_forward(q, k, v, seqused_q=used_q, seqused_k=used_k, causal=True)

    def compute(q, k, v):
        outs, lses = [], []
        for b in range(2):
            n = 9 if used_q is None else used_q[b]
            m = 13 if used_k is None else used_k[b]
            o, s = sequence(q[b, :n], k[b, :m], v[b, :m], causal=True)
            outs.append(torch.cat((o, q.new_zeros(9 - n, *o.shape[1:]))))
            lses.append(torch.cat((s, s.new_full((4, 9 - n), INF)), 1))
        return torch.stack(outs), torch.stack(lses).masked_fill(torch.stack(lses) == INF, -INF)

    check_both((out, lse), compute, q, k, v)
    dout = torch.randn_like(out)
    check_gradients(torch.autograd.grad(out, (q, k, v), dout), compute, q, k, v, dout)
    assert (
        used_k is None
        or torch.autograd.grad(fa3._flash_attn_forward(q, k, v, seqused_k=used_k)[0].sum(), k)[0][1, 6:].abs().max()
        == 0
    )


def test_deterministic_gradients_race():
    q, k, v = tensors(2, 150, 150, 8, 1, 64, dtype=BF16, grad=True)
    dout = torch.randn(q.shape, dtype=BF16)

    def gradients(out):
        return torch.autograd.grad(out, (q, k, v), dout)

    first = gradients(fa3.flash_attn_func(q, k, v, causal=True, deterministic=True))
    for _ in range(3):
        again = gradients(fa3.flash_attn_func(q, k, v, causal=True, deterministic=True))
        recorded = gradients(fa3._flash_attn_forward(q, k, v, causal=True)[0])
        for a, b, c in zip(first, again, recorded, strict=True):
            assert torch.equal(a, b) and torch.equal(a, c)


def test_scheduler_metadata_of_a_padded_graph_is_refused():
    q, k, v = tensors(4, 1, 30)
    padded = fa3.get_scheduler_metadata(64, 1, 30, 4, 2, 16, torch.full((64,), 30, dtype=torch.int32), causal=True)
    out = fa3.flash_attn_with_kvcache(q, k, v, causal=True, scheduler_metadata=padded)
    check(out, lambda *x: dense(*x)[0], q, k, v)


@pytest.mark.parametrize("cu_seqlens_k", [None, torch.zeros(3, dtype=torch.int32)], ids=["none", "zeros"])
def test_seqused_k_without_pages_reads_offsets_that_are_not_there(cu_seqlens_k):
    q, k, v = tensors(None, 9, 12)
    with pytest.raises(ValueError, match=r"cu_seqlens_k is not|seqused_k\[0\] is 5, allowed is 0 to 0"):
        flash_attn_vllm.flash_attn_varlen_func(
            q, k, v, offsets([4, 5]), cu_seqlens_k, 5, 6, causal=True, seqused_k=lengths(5, 6)
        )


@pytest.mark.parametrize("sink", [-300.0, 0.0, 90.0, 300.0, 1e4])
def test_a_sink_far_above_the_row_maximum_overflows(sink):
    q, k, v = tensors(2, 9, 9)
    sinks = torch.tensor([sink, 0.0, -sink, 1.0])
    result = fa3.flash_attn_func(q, k, v, causal=True, s_aux=sinks, return_attn_probs=True)
    check_both(result, lambda *x: dense(*x, causal=True, sinks=sinks), q, k, v)
    cached = fa3.flash_attn_with_kvcache(q[:, -1:], k, v, s_aux=sinks)
    check(cached, lambda *x: dense(*x, sinks=sinks)[0], q[:, -1:], k, v)
