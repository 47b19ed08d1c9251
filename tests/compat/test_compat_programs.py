"""The programs of flash-attention-SWAA's and FlexHeadFA's pages run as printed, and give what the oracle gives."""

import os
import pathlib
import re

import pytest
import torch
from oracle import check, dense, offsets, sequence, tensors

FOLDER = pathlib.Path(__file__).parent / "programs"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def program(file, title):
    text = (FOLDER / file).read_text().split(f"## {title}\n")[1]
    return re.search(r"```python\n(.*?)```", text, re.S)[1].replace('"cuda"', f'"{DEVICE}"')


def run(file, title, monkeypatch, module=None, function=None):
    """What the program leaves behind, and every (args, kwargs, result) of `function`."""
    calls = []
    if function:
        original = getattr(module, function)

        def record(*args, **kwargs):
            result = original(*args, **kwargs)
            calls.append((args, kwargs, result))
            return result

        monkeypatch.setattr(module, function, record)
    names = {}
    environment = dict(os.environ)
    try:
        exec(compile(program(file, title), title, "exec"), names)
    finally:
        os.environ.clear()
        os.environ.update(environment)
    return names, calls


def test_swaa_flash_attn_func_as_printed(monkeypatch):
    import flash_attn

    names, calls = run("swaa.md", "flash_attn_func", monkeypatch, flash_attn, "flash_attn_func")
    assert [call[1]["window_size"][0] for call in calls] == [-1, 100, 1000, 4000, 8000]
    n = names["query_length"]
    rows = torch.cat([torch.arange(6), torch.randint(0, n, (24,)), torch.tensor([n - 1])])
    for (q, k, v), options, out in calls:
        assert out.shape == q.shape
        mask = dict(causal=True, window=options["window_size"], keep_first=4, force_fa_decode=True, rows=rows)
        q, k, v = (x[0].cpu() for x in (q, k, v))
        check(out[0].cpu()[rows], lambda *x, mask=mask: sequence(*x, **mask)[0], q, k, v)


def test_swaa_flash_attn_varlen_func_as_printed(monkeypatch):
    import flash_attn

    names, [(args, _, out)] = run(
        "swaa.md", "flash_attn_varlen_func", monkeypatch, flash_attn, "flash_attn_varlen_func"
    )
    seqlens = names["seqlens"]
    q, k, v, out = (x.cpu().split(seqlens) for x in (*args[:3], out))
    for b, n in enumerate(seqlens):
        rows = torch.arange(n) if n < 10 else torch.randint(0, n, (24,))
        mask = dict(causal=True, window=(4000, 4000), keep_first=4, force_fa_decode=True, rows=rows)
        check(out[b][rows], lambda *x, mask=mask: sequence(*x, **mask)[0], q[b], k[b], v[b])


def test_swaa_varlen_fwd_with_pages_of_16_as_printed(monkeypatch):
    names, _ = run("swaa.md", "flash_attn_2_cuda.varlen_fwd", monkeypatch)
    out, lse, probs, rng_state = names["output"]
    q, k, v, table = (names[name].cpu() for name in ("q", "k", "v", "block_table"))
    assert out.shape == q.shape and lse.shape == (8, len(q)) and probs.numel() == 0 and rng_state.shape == (2,)
    cu = offsets(names["seqlen_q"]).tolist()
    for b, (n, keys) in enumerate(zip(names["seqlen_q"], names["seqlen_k"], strict=True)):
        rows = torch.randint(0, n, (24,))
        position = torch.arange(keys)
        pages = table[b, position // 16].long()
        kb, vb = k[pages, position % 16], v[pages, position % 16]
        options = dict(causal=True, window=(2000, 0), keep_first=10, force_fa_decode=True, softcap=1.0, scale=8.0)
        one = slice(cu[b], cu[b + 1])
        check(out.cpu()[one][rows], lambda *x, o=options: sequence(*x, rows=rows, **o)[0], q[one], kb, vb)


@pytest.mark.parametrize("d,dv", [(32, 64), (64, 128), (96, 192), (128, 256), (192, 128)])
@pytest.mark.parametrize("page", ["FlashAttention-2", "FlashAttention-3"])
def test_flex_head_fa_page_head_dims(page, d, dv):
    names = {}
    exec(program("flex_head_fa.md", page), names)
    q, k, v = tensors(2, 40, 40, 4, 2, d, dv, grad=True)
    out = names["flash_attn_func"](q, k, v, causal=True)
    check(out, lambda *x: dense(*x, causal=True)[0], q, k, v)
    out.sum().backward()
    assert q.grad.shape == q.shape and k.grad.shape == k.shape and v.grad.shape == v.shape
    if page == "FlashAttention-2":
        cached = names["flash_attn_with_kvcache"](q[:, -1:], k, v, causal=True)
        check(cached, lambda *x: dense(*x, causal=True)[0], q[:, -1:], k, v)


def test_flex_head_fa_page_unequal_heads_of_k_and_v():
    names = {}
    exec(program("flex_head_fa.md", "FlashAttention-2"), names)
    q, k, v = tensors(1, 24, 24, heads=32, heads_k=4, heads_v=16)
    check(names["flash_attn_func"](q, k, v), lambda *x: dense(*x)[0], q, k, v)
    check(names["flash_attn_with_kvcache"](q[:, -1:], k, v), lambda *x: dense(*x)[0], q[:, -1:], k, v)
