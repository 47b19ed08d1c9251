"""The drop-ins on CUDA tensors: functions, operators and programs of FlashAttention 2, SWAA and FlexHeadFA."""

import importlib
import os
import re

import generator
import jobs
import torch
from fronts import ROOT, check_gradients, check_results, described, replaced
from scenario import ints, qkv, randn, same_bits, scenario

SEVEN = ("flash_attn", "flash_attn.swaa", "flash_attn_vllm", "flex_head_fa")
OPTIONS = dict(softmax_scale=0.15, causal=True, window_size=(40, 0), keep_first=4, deterministic=True)
MASK = dict(scale=0.15, causal=True, window=(40, 0), keep_first=4)


@scenario([dict(module=m, kind=kind) for m in SEVEN for kind in ("attention", "cache")])
def generated_calls(strobe, module, kind):
    """The suite's own generated calls, made of a drop-in: every option, forward, backward and with a KV cache."""
    functions = importlib.import_module(module)
    groups = generator.attention_groups()[:4] if kind == "attention" else generator.cache_groups()[:4]
    for group in groups:  # each has its own features of the score; the last ones are paged
        for job in group[SEVEN.index(module) :: 4]:
            jobs.perform(functions, job, "cuda")


def _packed_inputs(name, q, k, v):
    packed = name.startswith("flash_attn_varlen")
    if packed:
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    tensors = (torch.stack((q, k, v), -3),) if "qkvpacked" in name else (q, torch.stack((k, v), -3))
    if not packed:
        return tensors
    cu = ints(0, 150, 400)
    return (*tensors, cu, 250) if "qkvpacked" in name else (*tensors, cu, cu, 250, 250)


PACKED = [f"flash_attn_{v}{p}packed_func" for v in ("", "varlen_") for p in ("qkv", "kv")]


@scenario([dict(module=m, name=name) for m in SEVEN for name in PACKED])
def packed_inputs(strobe, module, name):
    """In SWAA's order where the module has it: keep_first and force_fa_decode right after softcap."""
    q, k, v = qkv(200, heads=(4, 4, 4), grad=True)
    arguments, dout = _packed_inputs(name, q, k, v), randn(2, 200, 4, 64)
    if module == "flex_head_fa":
        out = getattr(importlib.import_module(module), name)(*arguments, **OPTIONS)
    else:
        positional = (0.0, 0.15, True, (40, 0), 0.0, 4, False, None, True)
        out = getattr(importlib.import_module(module), name)(*arguments, *positional)
    lens = [150, 250] if "varlen" in name else [200, 200]
    flat = [x.detach().flatten(0, 1) for x in (q, k, v)]
    call = described(*flat, lens, lens, **MASK)
    check_results(call, out.view(400, 4, 64))
    gradients = torch.autograd.grad(out, (q, k, v), dout.view(out.shape))
    check_gradients(call, [g.flatten(0, 1) for g in gradients], dout.flatten(0, 1))


@scenario([dict(module=m, dims=d) for m in SEVEN for d in ((20, 20), (60, 100))])
def head_dims_that_flash_attention_pads(strobe, module, dims):
    """No multiples of 8: FlashAttention's own functions pad them, and so do the drop-ins on a GPU."""
    functions = importlib.import_module(module)
    q, k, v = qkv(130, (4, 2, 2), dims, grad=True)
    inputs, dout = (q, k, v), randn(2, 130, 4, dims[1])
    call = described(*(x.detach() for x in inputs), causal=True, window=(40, 0))
    out, lse, _ = functions.flash_attn_func(*inputs, causal=True, window_size=(40, 0), return_attn_probs=True)
    check_results(call, out, lse)
    check_gradients(call, torch.autograd.grad(out, inputs, dout), dout)
    flat, cu = [x.detach().flatten(0, 1) for x in inputs], ints(0, 130, 260)
    out = functions.flash_attn_varlen_func(*flat, cu, cu, 130, 130, causal=True, window_size=(40, 0))
    check_results(call, out.view(2, 130, 4, dims[1]))


@scenario([dict(module=m, swaa=s) for m in ("flash_attn_2_cuda", "flash_attn_2_cuda_vllm") for s in (False, True)])
def extension(strobe, module, swaa):
    """All five functions; the number of arguments tells FlashAttention's order from SWAA's."""
    module, kept = importlib.import_module(module), (4, True) if swaa else ()
    q, k, v = qkv(130, (4, 2, 2))
    dout, slopes = randn(2, 130, 4, 64), torch.rand(4, device="cuda")
    mask = dict(causal=True, window=(30, 0), keep_first=4 * swaa, slopes=slopes, scale=0.15)
    buffer, tail = torch.full_like(q, float("nan")), (True, 30, 0, 0.0, *kept)
    out, lse, probs, rng_state = module.fwd(q, k, v, buffer, slopes, 0.0, 0.15, *tail, False, None)
    assert out.data_ptr() == buffer.data_ptr() and probs.numel() == 0
    call = described(q, k, v, **mask)
    check_results(call, out, lse)
    results = (q, k, v, out, lse, None, None, None)
    gradients = module.bwd(dout, *results, slopes, 0.0, 0.15, *tail, True, None, rng_state)
    check_gradients(call, gradients[:3], dout)
    torch.testing.assert_close(
        gradients[3][..., :130], (dout.float() * out.float()).sum(-1).transpose(1, 2), atol=1e-2, rtol=1e-2
    )

    cu, flat = ints(0, 130, 260), [x.flatten(0, 1) for x in (q, k, v)]
    varlen = (130, 130, 0.0, 0.15, False, *tail)
    packed = module.varlen_fwd(*flat, None, cu, cu, None, None, None, slopes, *varlen, False, None)
    same_bits(packed[:2], (out.flatten(0, 1), lse.transpose(0, 1).flatten(1)))
    head = (dout.flatten(0, 1), *flat, *packed[:2], None, None, None, cu, cu, slopes)
    same_bits(module.varlen_bwd(*head, *varlen, True, None, rng_state)[:3], [g.flatten(0, 1) for g in gradients[:3]])
    cache = (None, None, ints(130, 130), None, None, None, None, None, slopes, None, 0.15)
    check_results(call, *module.fwd_kvcache(q, k, v, *cache, *tail, True, 0))


@scenario()
def extension_of_flex_head_fa(strobe):
    """Eight results, dqk != dv and own heads of V."""
    import flex_head_fa_2_cuda as module

    q, k, v = qkv(130, (8, 4, 2), (64, 128))
    dout, call = randn(2, 130, 8, 128), described(q, k, v, causal=True, window=(30, 0), scale=0.15)
    results = module.fwd(q, k, v, None, None, 0.0, 0.15, True, 30, 0, 0.0, False, None)
    out, lse, rng_state = results[0], results[5], results[7]
    assert len(results) == 8
    check_results(call, out, lse)
    tensors = (dout, q, k, v, out, lse, None, None, None, None)
    gradients = module.bwd(*tensors, 0.0, 0.15, True, 30, 0, 0.0, True, None, rng_state)
    check_gradients(call, gradients[:3], dout)
    cu, flat = ints(0, 130, 260), [x.flatten(0, 1) for x in (q, k, v)]
    packed = module.varlen_fwd(
        *flat, None, cu, cu, None, None, None, None, 130, 130, 0.0, 0.15, False, True, 30, 0, 0.0, False, None
    )
    same_bits((packed[0], packed[5]), (out.flatten(0, 1), lse.transpose(0, 1).flatten(1)))


@scenario([dict(namespace="flash_attn"), dict(namespace="flash_attn_vllm")])
def operators(strobe, namespace):
    """The semi-private custom ops, dense and packed, forward and backward."""
    importlib.import_module(f"{namespace}.flash_attn_interface")
    ops = getattr(torch.ops, namespace)
    kept = dict(keep_first=4, force_fa_decode=False)
    q, k, v = qkv(130, (4, 2, 2), (64, 128))
    dout, call = randn(2, 130, 4, 128), described(q, k, v, **MASK)
    scalars = dict(dropout_p=0.0, softmax_scale=0.15, causal=True, window_size_left=40, window_size_right=0)
    scalars |= dict(softcap=0.0, alibi_slopes=None, **kept)
    out, lse, _, rng_state = ops._flash_attn_forward(q, k, v, return_softmax=False, **scalars)
    check_results(call, out, lse)
    gradients = [torch.full_like(x, float("nan")) for x in (q, k, v)]
    ops._flash_attn_backward(dout, q, k, v, out, lse, *gradients, deterministic=True, rng_state=None, **scalars)
    check_gradients(call, gradients, dout)

    lens = [100, 1, 159]
    cu, flat = ints(0, 100, 101, 260), [x.flatten(0, 1) for x in (q, k, v)]
    lengths = dict(cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=159, max_seqlen_k=159)
    call = described(*flat, lens, lens, **MASK)
    out, lse, _, _ = ops._flash_attn_varlen_forward(*flat, return_softmax=False, **lengths, **scalars)
    check_results(call, out, lse)
    gradients = [torch.full_like(x, float("nan")) for x in flat]
    dout = dout.flatten(0, 1)
    ops._flash_attn_varlen_backward(
        dout, *flat, out, lse, *gradients, deterministic=True, rng_state=None, **lengths, **scalars
    )
    check_gradients(call, gradients, dout)


@scenario()
def dropout_of_the_operators(strobe):
    """The backward operator drops what the forward dropped: out is linear in v, so <dv, v> = <dout, out>."""
    from flash_attn import flash_attn_interface as interface

    q, k, v = qkv(130, (4, 4, 4))
    dout = randn(2, 130, 4, 64)
    scalars = (0.3, 0.15, True, -1, -1, 0.0, None)
    out, lse, probs, rng_state = interface._flash_attn_forward(q, k, v, *scalars, True)
    assert (probs < 0).any() and probs.is_cuda
    gradients = [torch.empty_like(x) for x in (q, k, v)]
    interface._flash_attn_backward(dout, q, k, v, out, lse, *gradients, *scalars, True, rng_state)
    one, other = ((a.double() * b.double()).sum() for a, b in ((gradients[2], v), (dout, out)))
    scale = (dout.double() * out.double()).abs().sum().item()
    assert abs((one - other).item()) <= 1e-3 * scale, f"{one} and {other}"


@scenario([dict(module="flash_attn"), dict(module="flash_attn_interface")])
def compiled(strobe, module):
    function = importlib.import_module(module).flash_attn_func
    torch._dynamo.reset()
    q, k, v = qkv(130, grad=True)

    def run(q, k, v):
        return function(q, k, v, causal=True, window_size=(40, 0), keep_first=4, deterministic=True) * 2

    out, dout = torch.compile(run, fullgraph=True, backend="aot_eager")(q, k, v), randn(2, 130, 4, 64)
    same_bits(out, run(q, k, v))
    inputs = (q, k, v)
    same_bits(torch.autograd.grad(out, inputs, dout), torch.autograd.grad(run(*inputs), inputs, dout))


@scenario([dict(module=m) for m in ("flash_attn", "flash_attn_vllm", "flex_head_fa")])
def padding_and_rotary(strobe, module):
    """Plain tensor functions: on the GPU what they are on the CPU."""
    padding, rotary = (importlib.import_module(f"{module}.{part}") for part in ("bert_padding", "layers.rotary"))
    x = randn(3, 40, 4, 64, dtype=torch.float32, device="cpu")
    mask = torch.rand(3, 40) < 0.7
    angle = torch.rand(60, 16)
    results = []
    for device in ("cpu", "cuda"):
        tensor, cos, sin = (t.to(device) for t in (x, angle.cos(), angle.sin()))
        rows, indices, cu, longest, used = padding.unpad_input(tensor, mask.to(device))
        results.append([
            rows, indices, cu, used, padding.pad_input(rows, indices, 3, 40), torch.tensor(longest),
            rotary.apply_rotary_emb(tensor, cos, sin, seqlen_offsets=5),
            rotary.apply_rotary_emb(tensor, cos, sin, True, seqlen_offsets=torch.tensor([1, 0, 9], device=device)),
        ])  # fmt: skip
    for cpu, cuda in zip(*results, strict=True):
        torch.testing.assert_close(cuda.cpu(), cpu, atol=1e-6, rtol=1e-6)


def _program(file, title):
    text = (ROOT / "tests" / "compat" / "programs" / file).read_text().split(f"## {title}\n")[1]
    return compile(re.search(r"```python\n(.*?)```", text, re.S)[1], title, "exec")


def _run(program):
    """What a printed program leaves behind, and its environment undone."""
    names, environment = {}, dict(os.environ)
    try:
        exec(program, names)
    finally:
        os.environ.clear()
        os.environ.update(environment)
    return names


def _some_rows(q, k, v, out, rows, **mask):
    """One sequence, compared at some of its query rows."""
    import oracle

    scale = mask.pop("scale", None)
    softcap = mask.pop("softcap", 0.0)
    with torch.device("cuda"):
        seen = oracle.visible(len(q), len(k), **mask)[rows]
    call = described(q[rows], k, v, [len(rows)], [len(k)], scale, masks=[seen], softcap=softcap)
    check_results(call, out[rows])


@scenario([dict(title=t) for t in ("flash_attn_func", "flash_attn_varlen_func", "flash_attn_2_cuda.varlen_fwd")])
def programs_of_swaa(strobe, title):
    """As printed on SWAA's page, on the device that they name."""
    import flash_attn

    if title == "flash_attn_2_cuda.varlen_fwd":
        _paged_program(_run(_program("swaa.md", title)))
        return
    calls, inner = [], getattr(flash_attn, title)

    def recorded(*args, **kwargs):
        calls.append((args, kwargs, inner(*args, **kwargs)))
        return calls[-1][2]

    with replaced(flash_attn, title, recorded):
        names = _run(_program("swaa.md", title))
    mask = dict(causal=True, keep_first=4, force_fa_decode=True)
    if title == "flash_attn_func":
        assert [call[1]["window_size"][0] for call in calls] == [-1, 100, 1000, 4000, 8000]
        rows = torch.tensor([0, 1, 5, 99, 100, 101, 4003, 9999], device="cuda")
        for (q, k, v), options, out in calls:
            _some_rows(q[0], k[0], v[0], out[0], rows, window=options["window_size"], **mask)
        return
    ((args, _, out),) = calls
    parts = zip(*(x.split(names["seqlens"]) for x in (*args[:3], out)), strict=True)
    for n, part in zip(names["seqlens"], parts, strict=True):
        rows = torch.tensor(sorted({0, n // 2, n - 1}), device="cuda")
        _some_rows(*part, rows, window=(4000, 4000), **mask)


def _paged_program(names):
    out, lse, probs, _ = names["output"]
    q, k, v, table = (names[name] for name in ("q", "k", "v", "block_table"))
    assert out.shape == q.shape and lse.shape == (8, len(q)) and probs.numel() == 0
    at = 0
    for b, (n, keys) in enumerate(zip(names["seqlen_q"], names["seqlen_k"], strict=True)):
        position = torch.arange(keys, device="cuda")
        pages = table[b, position // 16].long()
        rows = torch.tensor([0, n // 2, n - 1], device="cuda")
        mask = dict(causal=True, window=(2000, 0), keep_first=10, force_fa_decode=True, softcap=1.0, scale=8.0)
        one = slice(at, at + n)
        _some_rows(q[one], k[pages, position % 16], v[pages, position % 16], out[one], rows, **mask)
        at += n


@scenario([dict(page=p, dims=d) for p in ("FlashAttention-2", "FlashAttention-3") for d in ((32, 64), (192, 128))])
def programs_of_flex_head_fa(strobe, page, dims):
    names = _run(_program("flex_head_fa.md", page))
    q, k, v = qkv(130, (8, 4, 4), dims, grad=True)
    out, dout = names["flash_attn_func"](q, k, v, causal=True), randn(2, 130, 8, dims[1])
    call = described(*(x.detach() for x in (q, k, v)), causal=True)
    check_results(call, out)
    check_gradients(call, torch.autograd.grad(out, (q, k, v), dout), dout)
    if page == "FlashAttention-2":
        one = [x.detach() for x in (q[:, -1:], k, v)]
        check_results(described(*one, causal=True), names["flash_attn_with_kvcache"](*one, causal=True))


@scenario()
def replayed_in_a_graph(strobe):
    """Packed attention over pages of 16, SWAA's call for vLLM, captured once and replayed with other lengths."""
    from flash_attn_vllm import flash_attn_varlen_func

    k, v = (randn(40, 16, 2, 64) for _ in range(2))
    q, table = randn(3, 4, 64), torch.randperm(40, device="cuda").int()[:36].view(3, 12)
    used, cu, out = ints(30, 100, 180), ints(0, 1, 2, 3), torch.empty_like(q)

    def run():
        return flash_attn_varlen_func(
            q, k, v, cu, None, 1, 192, causal=True, window_size=(20, 0), keep_first=4, seqused_k=used,
            block_table=table, out=out,
        )  # fmt: skip

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for lens in ([30, 100, 180], [1, 192, 17]):
        used.copy_(ints(*lens))
        q.copy_(randn(3, 4, 64))
        graph.replay()
        keys = [torch.cat([x[table[b].long()].flatten(0, 1)[:n] for b, n in enumerate(lens)]) for x in (k, v)]
        check_results(described(q, *keys, [1, 1, 1], lens, causal=True, window=(20, 0), keep_first=4), out)
