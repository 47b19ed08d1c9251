"""What is not served on a GPU is refused before anything runs, in words that name the function and what is allowed."""

import functools

import torch
from scenario import Skip, ints, qkv, raises, randn, scenario

REFUSED = (ValueError, TypeError, NotImplementedError)
NAME = "flash_attn_func: "


def _dense(strobe, change, **options):
    q, k, v = qkv()
    return lambda: strobe.flash_attn_func(*change(q, k, v), **options)


def _head_dims(d, dv, dtype=torch.bfloat16):
    return lambda *_: qkv(20, dims=(d, dv), dtype=dtype)


CALLS = {
    "q on the CPU": ("is on cuda:0 but q is on cpu", lambda q, k, v: (q.cpu(), k, v), {}),
    "k on the CPU": ("k is on cpu but q is on cuda:0", lambda q, k, v: (q, k.cpu(), v), {}),
    "float32": ("q is f32, allowed on a GPU is f16 or bf16", _head_dims(64, 64, torch.float32), {}),
    "float64": ("q is", _head_dims(64, 64, torch.float64), {}),
    "dtype of k": ("k is f16", lambda q, k, v: (q, k.half(), v), {}),
    "head_dim 60": ("head_dim of q is 60, allowed on a GPU is a multiple of 8: the nearest are 56 and 64",
                    _head_dims(60, 64), {}),
    "head_dim_v 100": ("head_dim of v is 100, allowed on a GPU is a multiple of 8: the nearest are 96 and 104",
                       _head_dims(64, 100), {}),
    "head_dim 4": ("head_dim of q is 4, allowed on a GPU is 8 and more", _head_dims(4, 64), {}),
    "head_dim_v 264": ("the nearest that fit are 128 and 256", _head_dims(128, 264), {}),
    "head_dim 640": ("the nearest that fit are 576", _head_dims(640, 512), {}),
    "head_dim of k": ("head_dim of k is 72 but of q is 64", lambda q, k, v: (q, qkv(dims=(72, 64))[1], v), {}),
    "num_heads_k": ("k has 3 heads, allowed is a divisor of the 4 heads of q",
                    lambda q, k, v: (q, randn(2, 200, 3, 64), v), {}),
    "alignment": ("the data of q is not aligned, allowed on a GPU is a multiple of 16 bytes",
                  lambda q, k, v: (randn(2 * 200 * 4 * 64 + 8)[1:-7].view(2, 200, 4, 64), k, v), {}),
    "stride": ("of q, allowed on a GPU is a multiple of 16 bytes",
               lambda q, k, v: (randn(2, 200, 4, 68)[..., :64], k, v), {}),
    "backend of the CPU": ("backend is 'cpu', allowed for tensors on a GPU is", lambda *t: t, dict(backend="cpu")),
    "backend unknown": ("backend is 'sm70', allowed for tensors on a GPU is", lambda *t: t, dict(backend="sm70")),
    "softcap with dropout": ("softcap", lambda *t: t, dict(softcap=1.0, dropout_p=0.1)),
    "dropout 1": ("dropout_p", lambda *t: t, dict(dropout_p=1.0)),
    "keep_first": ("keep_first", lambda *t: t, dict(keep_first=-1)),
    "window": ("window", lambda *t: t, dict(window_size=(-2, 0))),
}  # fmt: skip


@scenario([dict(name=name) for name in CALLS])
def dense(strobe, name):
    text, change, options = CALLS[name]
    call = _dense(strobe, change, **options)
    message = raises(REFUSED, text, call)
    assert message.startswith(NAME), message


@scenario([dict(name=name) for name in ("cu_seqlens_k", "seqused_k", "alibi_slopes", "s_aux", "full_from")])
def side_tensor_on_the_cpu(strobe, name):
    q, k, v = qkv()
    if name == "cu_seqlens_k":
        flat = [x.flatten(0, 1) for x in (q, k, v)]
        cu = ints(0, 200, 400)
        call = functools.partial(strobe.flash_attn_varlen_func, *flat, cu, cu.cpu(), 200, 200)
    else:
        value = torch.ones(4) if name in ("alibi_slopes", "s_aux") else ints(5, 5, device="cpu")
        call = functools.partial(strobe.flash_attn_func, q, k, v, **{name: value})
    raises(REFUSED, f"{name} is on cpu but q is on cuda:0", call)


@scenario()
def page_size(strobe):
    q, k, v = randn(4, 4, 64), randn(9, 12, 2, 64), randn(9, 12, 2, 64)
    table = dict(seqused_k=ints(20), page_table=ints(1, 2).view(1, 2))
    call = functools.partial(strobe.flash_attn_varlen_func, q, k, v, ints(0, 4), None, 4, 24, **table)
    raises(REFUSED, "page_size of k is 12, allowed on a GPU is a multiple of 8", call)


@scenario()
def gradients_of_pages(strobe):
    q, k, v = (t.requires_grad_() for t in (randn(4, 4, 64), randn(9, 16, 2, 64), randn(9, 16, 2, 64)))
    out = strobe.flash_attn_varlen_func(
        q, k, v, ints(0, 4), None, 4, 32, seqused_k=ints(20), page_table=ints(1, 2).view(1, 2)
    )
    raises((*REFUSED, RuntimeError), "page_table is given", lambda: out.sum().backward())


@scenario()
def gradients_of_large_head_dims(strobe):
    q, k, v = qkv(20, dims=(512, 512), grad=True)
    out = strobe.flash_attn_func(q, k, v)
    raises((*REFUSED, RuntimeError), "allowed are multiples of 8 up to 256 each", lambda: out.sum().backward())


@scenario()
def out_on_the_cpu(strobe):
    q, k, v = qkv()
    out = torch.empty(q.shape, dtype=q.dtype)
    raises(REFUSED, "out is on cpu but q is on cuda:0", lambda: strobe.flash_attn_func(q, k, v, out=out))


@scenario()
def two_devices(strobe):
    if torch.cuda.device_count() < 2:
        raise Skip("one GPU")
    q, k, v = qkv()
    raises(REFUSED, "k is on cuda:1 but q is on cuda:0", lambda: strobe.flash_attn_func(q, k.to("cuda:1"), v))


@scenario()
def refused_calls_leave_the_device_usable(strobe):
    q, k, v = qkv()
    expected = strobe.flash_attn_func(q, k, v)
    for name in ("float32", "head_dim_v 264", "backend unknown"):
        dense(strobe, name)
    assert torch.equal(strobe.flash_attn_func(q, k, v), expected)


@scenario()
def out_of_memory_leaves_the_device_usable(strobe):
    q, k, v = qkv()
    expected = strobe.flash_attn_func(q, k, v)
    large = randn(1, 1 << 20, 4, 64)
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / torch.cuda.mem_get_info()[1])
    try:
        raises((torch.OutOfMemoryError,), "out of memory", lambda: strobe.flash_attn_func(large, large, large))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert torch.equal(strobe.flash_attn_func(q, k, v), expected)
