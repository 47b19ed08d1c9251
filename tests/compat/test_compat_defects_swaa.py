"""What goes wrong in flash-attention-SWAA, one test each. S1 .. S13 and 6.x number its known defects."""

import inspect
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import flash_attn
import flash_attn_2_cuda
import flash_attn_2_cuda_vllm
import flash_attn_vllm
import pytest
import torch
from flash_attn.flash_attn_interface import _flash_attn_varlen_forward, _get_block_size_n
from oracle import (
    BF16,
    check,
    check_both,
    check_gradients,
    dense,
    lengths,
    offsets,
    packed,
    sequence,
    tensors,
    visible,
)

INF = float("inf")
MODULES = pytest.mark.parametrize("module", [flash_attn, flash_attn_vllm], ids=lambda m: m.__name__)
EXTENSIONS = pytest.mark.parametrize("extension", [flash_attn_2_cuda, flash_attn_2_cuda_vllm], ids=lambda m: m.__name__)


def pages_of(keys, size, spare=3):
    """(pages, table) of lists of [n, heads, dim]; unused memory is NaN, unused columns -1."""
    counts = [-(-len(k) // size) for k in keys]
    order = torch.randperm(sum(counts) + spare).int()
    pages = torch.full((len(order), size, *keys[0].shape[1:]), float("nan"), dtype=keys[0].dtype)
    table = torch.full((len(keys), max(counts) + 1), -1, dtype=torch.int32)
    for b, k in enumerate(keys):
        table[b, : counts[b]], order = order[: counts[b]], order[counts[b] :]
        j = torch.arange(len(k))
        pages[table[b, j // size].long(), j % size] = k
    return pages, table


def paged(k, v, lens, size):
    """k and v, packed, in pages under one table."""
    both, table = pages_of(list(torch.cat((k, v), -1).split(lens)), size)
    return both[..., : k.shape[-1]], both[..., k.shape[-1] :], table


@MODULES
@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize("window", [1, 16, 63, 64, 65, 127, 128, 129])
def test_s1_kept_tokens_use_the_keys_of_another_tile(module, window, d):
    q, k, v = tensors(1, 300, 300, 2, 1, d)
    mask = dict(causal=True, keep_first=10)
    out = module.flash_attn_func(q, k, v, window_size=(window, 0), **mask)
    check(out, lambda *x: dense(*x, window=(window, 0), **mask)[0], q, k, v)


@MODULES
@pytest.mark.parametrize("keys", [2300, 4000, 7900])
def test_s2_decoding_with_a_window_of_2000_is_wrong_at_some_positions(module, keys):
    q, k, v = tensors(1, 1, keys, 8, 2, 128, dtype=BF16)
    for sk in (keys, keys - 1, keys - 63, keys - 64):
        out = module.flash_attn_with_kvcache(
            q, k, v, cache_seqlens=sk, causal=True, window_size=(2000, 0), keep_first=10
        )
        mask = dict(causal=True, window=(2000, 0), keep_first=10)
        check(out, lambda *x, m=mask: dense(*x, **m)[0], q, k[:, :sk], v[:, :sk])


@EXTENSIONS
def test_s3_kept_tokens_of_more_than_a_tile_start_at_the_wrong_page(extension):
    lens = [1500, 700]
    q, k, v = tensors(None, 2, sum(lens), 4, 2, 64)
    pages_k, pages_v, table = paged(k, v, lens, 16)
    cu, used = offsets([1, 1]), lengths(*lens)
    out, lse, _, _ = extension.varlen_fwd(
        q, pages_k, pages_v, None, cu, torch.zeros_like(cu), used, None, table, None, 1, 1500, 0.0, 0.125, False,
        True, 40, 0, 0.0, 300, False, False, None,
    )  # fmt: skip

    def compute(*x):
        return packed(*x, [1, 1], lens, scale=0.125, causal=True, window=(40, 0), keep_first=300)

    check_both((out, lse), compute, q, k, v)


@EXTENSIONS
@pytest.mark.parametrize("size", [16, 48, 80])
@pytest.mark.parametrize("d", [32, 64, 128, 192])
def test_s4_small_pages_read_the_rows_behind_a_page(extension, d, size):
    lens_q, lens_k = [70, 1, 5], [300, 33, 5]
    q, k, v = tensors(None, 76, sum(lens_k), 2, 1, d)
    pages_k, pages_v, table = paged(k, v, lens_k, size)
    cu = offsets(lens_q)
    out, lse, _, _ = extension.varlen_fwd(
        q, pages_k, pages_v, None, cu, torch.zeros_like(cu), lengths(*lens_k), None, table, None, 70, 300, 0.0, 0.2,
        False, True, 100, 0, 0.0, 10, True, False, None,
    )  # fmt: skip
    mask = dict(causal=True, window=(100, 0), keep_first=10, force_fa_decode=True)
    check_both((out, lse), lambda *x: packed(*x, lens_q, lens_k, scale=0.2, **mask), q, k, v)


@MODULES
def test_s5_probabilities_of_kept_tokens_land_left_of_the_window(module):
    q, k, v = tensors(1, 200, 200, 2, 1, 64)
    mask = dict(causal=True, window=(5, 0), keep_first=3)
    out, lse, probs = module.flash_attn_func(
        q, k, v, 0.2, causal=True, window_size=(5, 0), keep_first=3, return_attn_probs=True
    )
    seen = visible(torch.arange(200), 200, 200, **mask)
    assert probs[0, :, :200, :200][:, ~seen].abs().max() == 0
    assert (probs[0, :, :200, :200][:, seen] != 0).all()
    keep = ~torch.signbit(probs[:, :, :200, :200])
    check(out, lambda *x: dense(*x, keep=keep, dropout_p=0.2, **mask)[0], q, k, v)
    assert _get_block_size_n(q.device, 64, True, True) == 64


@MODULES
@pytest.mark.parametrize("size", [None, 16])
def test_s6_appended_kept_tokens_are_read_before_they_are_written(module, size):
    """Nothing is in the cache yet; every row sees kept tokens of the same call, and far rows see little else."""
    q, k, v = tensors(2, 400, 400, 4, 2, 64)
    caches, call = [torch.full((2, 512, 2, 64), float("nan")) for _ in "kv"], {}
    if size:
        caches = [c.view(2 * 512 // size, size, 2, 64) for c in caches]
        call = dict(block_table=torch.randperm(64).int().reshape(2, 32))
    out = module.flash_attn_with_kvcache(
        q, *caches, k, v, cache_seqlens=0, causal=True, window_size=(3, 0), keep_first=100, **call
    )
    check(out, lambda *x: dense(*x, causal=True, window=(3, 0), keep_first=100)[0], q, k, v)


@MODULES
def test_s7_the_step_back_to_the_kept_tokens_overflows_32_bits(module):
    """Rows of 2^24 elements: the last row is 2^31 + 2^28 elements behind the first. Touched pages alone are memory."""
    rows, stride = 145, 2**24
    storage = torch.empty(rows * stride, dtype=BF16)
    k = storage.as_strided((1, rows, 2, 64), (rows * stride, stride, 64, 1))
    k.copy_(torch.randn(k.shape))
    q = torch.randn(1, 3, 2, 64, dtype=BF16)
    out = module.flash_attn_func(q, k, k, causal=True, window_size=(2, 0), keep_first=2)
    near = k.contiguous()
    check(out, lambda *x: dense(*x, causal=True, window=(2, 0), keep_first=2)[0], q, near, near)


@MODULES
def test_s8_the_backward_of_varlen_kvpacked_raises(module):
    q, k, v = tensors(None, 9, 9, grad=True)
    cu = offsets([4, 5])
    call = dict(causal=True, window_size=(3, 0), keep_first=1, force_fa_decode=True, deterministic=True)
    out = module.flash_attn_varlen_kvpacked_func(q, torch.stack((k, v), 1), cu, cu, 5, 5, **call)
    dout = torch.randn_like(out)
    mask = dict(causal=True, window=(3, 0), keep_first=1)
    gradients = torch.autograd.grad(out, (q, k, v), dout)
    check_gradients(gradients, lambda *x: packed(*x, [4, 5], [4, 5], **mask), q, k, v, dout)


@MODULES
def test_s9_force_fa_decode_is_missing_in_the_backward(module):
    lens_q, lens_k = [1, 6, 1], [40, 30, 3]
    q, k, v = tensors(None, 8, 73, grad=True)
    call = dict(causal=True, window_size=(4, 0), keep_first=2, force_fa_decode=True)
    out = module.flash_attn_varlen_func(q, k, v, offsets(lens_q), offsets(lens_k), 6, 40, **call)
    dout = torch.randn_like(out)
    gradients = torch.autograd.grad(out, (q, k, v), dout)

    def compute(*x):
        return packed(*x, lens_q, lens_k, causal=True, window=(4, 0), keep_first=2, force_fa_decode=True)

    check_gradients(gradients, compute, q, k, v, dout)
    assert (gradients[1][:40].abs().amax((1, 2)) > 0).all()  # every key of the decoding sequence has a gradient


@EXTENSIONS
@pytest.mark.parametrize("window", [(-1, -1), (50, 0)], ids=str)
@pytest.mark.parametrize("layout", ["packed", "paged"])
def test_s10_the_lse_of_decoding_is_in_the_order_of_kv_heads(extension, layout, window):
    """Section 6.2: [num_heads, total_q], paged or not, windowed or not."""
    lens = [100, 37, 260]
    q, k, v = tensors(None, 3, sum(lens), 8, 2, 64)
    cu, cu_k, used, table, keys = offsets([1, 1, 1]), offsets(lens), None, None, (k, v)
    if layout == "paged":
        *keys, table = paged(k, v, lens, 16)
        cu_k, used = torch.zeros_like(cu), lengths(*lens)
    out, lse, _, _ = extension.varlen_fwd(
        q, *keys, None, cu, cu_k, used, None, table, None, 1, 260, 0.0, 0.125, False, True, *window, 0.0, 5, False,
        False, None,
    )  # fmt: skip
    assert lse.shape == (8, 3)
    mask = dict(causal=True, window=window, keep_first=5, scale=0.125)
    check_both((out, lse), lambda *x: packed(*x, [1, 1, 1], lens, **mask), q, k, v)


@MODULES
@pytest.mark.parametrize("d", [129, 136, 144, 152, 160])
def test_s11_head_dims_129_to_160_break_in_decoding_and_backward(module, d):
    q, k, v = tensors(1, 3, 400, 2, 1, d, grad=True)
    call = dict(causal=True, window_size=(100, 0), keep_first=5)
    mask = dict(causal=True, window=(100, 0), keep_first=5)
    cached = module.flash_attn_with_kvcache(q, k, v, num_splits=4, **call)
    check(cached, lambda *x: dense(*x, **mask)[0], q, k, v)
    out = module.flash_attn_func(q, k, v, **call)
    dout = torch.randn_like(out)
    check_gradients(torch.autograd.grad(out, (q, k, v), dout), lambda *x: dense(*x, **mask), q, k, v, dout)


@MODULES
@pytest.mark.parametrize("backend", [None, "auto", "cpu"])
def test_s12_a_back_end_does_not_take_the_two_arguments(module, backend):
    q, k, v = tensors(1, 1, 20)
    call = dict(causal=True, window_size=(3, 0), keep_first=2, backend=backend)
    mask = dict(causal=True, window=(3, 0), keep_first=2)
    check(module.flash_attn_func(q, k, v, **call), lambda *x: dense(*x, **mask)[0], q, k, v)
    full = module.flash_attn_func(q, k, v, force_fa_decode=True, **call)
    check(full, lambda *x: dense(*x)[0], q, k, v)


BUILD = "from scikit_build_core.build import build_wheel; print(build_wheel({!r}))"


def test_s13_a_build_with_few_cores_has_no_jobs(tmp_path):
    """The drop-ins compile nothing, and the wheel of one job is whole."""
    root = Path(__file__).resolve().parents[2] / "compat"
    for folder in sorted(p.parent for p in root.glob("*/pyproject.toml")):
        done = subprocess.run(
            [sys.executable, "-c", BUILD.format(str(tmp_path))], cwd=folder, env=os.environ | dict(MAX_JOBS="0"),
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        name = done.stdout.split()[-1]
        assert name.endswith("-py3-none-any.whl")
        packed_names = set(zipfile.ZipFile(tmp_path / name).namelist())
        sources = {p.relative_to(folder).as_posix() for p in folder.rglob("*.py")}
        assert sources and sources <= packed_names


@EXTENSIONS
def test_out_is_not_written_when_query_heads_are_folded(extension):
    """Section 6.1: one query per sequence, grouped heads, and a preallocated out that is a slice."""
    lens = [100, 37]
    q, k, v = tensors(None, 2, sum(lens), 8, 2, 64)
    pages_k, pages_v, table = paged(k, v, lens, 16)
    wide = torch.full((2, 16, 64), float("nan"))
    buffer = wide[:, 4:12]
    cu = offsets([1, 1])
    out, *_ = extension.varlen_fwd(
        q, pages_k, pages_v, buffer, cu, torch.zeros_like(cu), lengths(*lens), None, table, None, 1, 100, 0.0, 0.125,
        False, True, -1, -1, 0.0, 0, False, False, None,
    )  # fmt: skip
    assert out.data_ptr() == buffer.data_ptr()
    check(buffer, lambda *x: packed(*x, [1, 1], lens, scale=0.125)[0], q, k, v)
    assert wide[:, :4].isnan().all() and wide[:, 12:].isnan().all()
    cached = torch.full((2, 1, 8, 64), float("nan"))
    result, _ = extension.fwd_kvcache(
        q[:, None], pages_k, pages_v, None, None, lengths(*lens), None, None, None, None, table, None, cached, 0.125,
        True, -1, -1, 0.0, 0, False, True, 0,
    )  # fmt: skip
    assert result.data_ptr() == cached.data_ptr() and torch.equal(cached[:, 0], buffer)


@pytest.mark.parametrize("value", [-1, -100])
def test_a_negative_keep_first_counts_as_zero(value):
    q, k, v = tensors(1, 4, 4)
    with pytest.raises(ValueError, match=f"keep_first is {value}, allowed is at least 0"):
        flash_attn.flash_attn_func(q, k, v, window_size=(2, 0), keep_first=value)


def test_callers_of_flash_attention_break_on_the_missing_defaults():
    """Section 2.3: the inserted arguments of the semi-private functions have defaults, unlike SWAA's."""
    from flash_attn import flash_attn_interface as interface

    for name in ("_flash_attn_forward", "_flash_attn_backward", "_flash_attn_varlen_backward"):
        parameters = inspect.signature(getattr(interface, name)._init_fn).parameters
        assert parameters["keep_first"].default == 0 and parameters["force_fa_decode"].default is False


@pytest.mark.parametrize("sq,sk", [(1, 30), (9, 30), (30, 9)])
def test_a_mixed_batch_and_chunks_of_one_token(sq, sk):
    """Section 4: each sequence is judged by itself, and what sees nothing stays empty."""
    lens_q, lens_k = [sq, 1, 3], [sk, 20, 3]
    q, k, v = tensors(None, sum(lens_q), sum(lens_k))
    out, lse, _, _ = _flash_attn_varlen_forward(
        q, k, v, offsets(lens_q), offsets(lens_k), max(lens_q), max(lens_k), 0.0, 0.25, True, 4, 0, keep_first=2,
        force_fa_decode=True,
    )  # fmt: skip
    mask = dict(causal=True, window=(4, 0), keep_first=2, force_fa_decode=True, scale=0.25)
    parts = zip(q.split(lens_q), k.split(lens_k), v.split(lens_k), strict=True)
    expected = [sequence(*x, **mask) for x in parts]
    assert (lse == INF).sum() == sum((r[1] == INF).sum() for r in expected) == 4 * max(0, sq - sk)
    check_both((out, lse), lambda *x: packed(*x, lens_q, lens_k, **mask), q, k, v)
