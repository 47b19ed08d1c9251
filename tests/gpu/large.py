"""Problems of a size that people run, and tensors of more than 2^31 elements."""

import torch
from scenario import Skip, ints, qkv, randn, scenario

import reference

SHAPES = [
    dict(length=4096, dims=(128, 128), options=dict(causal=True)),
    dict(length=5000, dims=(64, 128), options=dict(causal=True, window_size=(1000, 0), keep_first=4)),
    dict(length=3000, dims=(128, 128), options=dict(causal=True, window_size=(1000, 0), keep_first=4)),
    dict(length=3000, dims=(64, 64), options=dict(causal=True, window_size=(1000, 0), keep_first=4)),
    dict(length=3000, dims=(192, 128), options=dict(causal=True, window_size=(700, 0), keep_first=10, softcap=20.0)),
    dict(length=2500, dims=(256, 256), options=dict()),
    dict(length=4097, dims=(96, 192), options=dict(window_size=(333, 100), full_from=4000)),
]


def _oracle(q, k, v, options, dtype):
    """One head at a time, in `dtype`."""
    import oracle

    window, softcap = options.get("window_size", (-1, -1)), options.get("softcap", 0.0)
    mask = oracle.visible(
        q.shape[1], k.shape[1], options.get("causal", False), window, options.get("keep_first", 0), False,
        options.get("full_from"),
    )  # fmt: skip
    group_k, group_v = q.shape[2] // k.shape[2], q.shape[2] // v.shape[2]

    def one(h):
        tensors = q[0, :, h : h + 1], k[0, :, [h // group_k]], v[0, :, [h // group_v]]
        return reference.attend(*tensors, mask, q.shape[-1] ** -0.5, softcap).out

    return torch.cat([one(h) for h in range(q.shape[2])], 1)[None]


@scenario([dict(dtype=d, **shape) for d in (torch.bfloat16, torch.float16) for shape in SHAPES])
def long_sequences(strobe, dtype, length, dims, options):
    inputs = qkv(length, (4, 2, 1), dims, 1, dtype, grad=True)
    dout = randn(1, length, 4, dims[1], dtype=dtype)
    out = strobe.flash_attn_func(*inputs, **options)
    actual = [out, *torch.autograd.grad(out, inputs, dout)]

    def truth(to):
        leaves = [x.detach().to(to).requires_grad_() for x in inputs]
        with torch.device("cuda"):
            result = _oracle(*leaves, options, to)
        return [result.detach(), *torch.autograd.grad(result, leaves, dout.to(to))]

    exact, budget = truth(torch.float64), truth(dtype)
    for n, name in enumerate(("out", "dq", "dk", "dv")):
        floor = reference.floor_of(dtype, exact[n].abs().max().item())
        reference.assert_close(name, actual[n], exact[n], budget[n], 2 if n == 0 else 3, floor)


def _need(gigabytes):
    free = torch.cuda.mem_get_info()[0]
    if free < gigabytes << 30:
        raise Skip(f"{gigabytes} GiB of GPU memory are not free")


@scenario()
def pages_beyond_32_bits(strobe):
    """A pool of 2.3e9 elements: the last pages hold what the first hold."""
    _need(16)
    pages, size, heads, dim = 140_000, 16, 8, 128
    k, v = (torch.zeros(pages, size, heads, dim, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    few, q = 20, randn(2, 1, 32, dim)
    for t in (k, v):
        t[:few] = torch.randn_like(t[:few])
        t[-few:] = t[:few]
    table = torch.arange(few, device="cuda", dtype=torch.int32)[None]
    table = torch.cat((table, table + pages - few))
    out, lse = strobe.flash_attn_with_kvcache(
        q[:1].expand(2, 1, 32, dim).contiguous(), k, v, cache_seqlens=ints(300, 300), block_table=table,
        return_softmax_lse=True,
    )  # fmt: skip
    assert torch.equal(out[0], out[1]) and torch.equal(lse[0], lse[1])
    assert out.float().abs().sum() > 0
    new = randn(2, 1, heads, dim), randn(2, 1, heads, dim)
    strobe.flash_attn_with_kvcache(q, k, v, *new, cache_seqlens=ints(300, 300), block_table=table)
    assert torch.equal(k[pages - few + 300 // size, 300 % size], new[0][1, 0])
    assert torch.equal(v[300 // size, 300 % size], new[1][0, 0])


@scenario()
def batches_beyond_32_bits(strobe):
    """The last entry of q, k, v and their gradients lies beyond 2^31 elements."""
    _need(50)
    batch, length, heads, dim = 33, 4096, 128, 128
    small = [randn(1, length, heads, dim) for _ in range(3)]
    inputs = [x.expand(batch, length, heads, dim).contiguous().requires_grad_() for x in small]
    assert inputs[0].numel() > 2**31
    out = strobe.flash_attn_func(*inputs, causal=True, window_size=(64, 0), deterministic=True)
    assert torch.equal(out[0], out[-1]) and out[-1].float().abs().sum() > 0
    gradients = torch.autograd.grad(out, inputs, inputs[0].detach())
    for g in gradients:
        assert torch.equal(g[0], g[-1]) and g[-1].float().abs().sum() > 0
