"""Every route by which torch may reach attention gives on a GPU what a plain eager call gives."""

import functools

import torch
from scenario import ints, qkv, raises, randn, same_bits, scenario
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

FIXED = dict(causal=True, deterministic=True)


def dense(strobe, q, k, v, **options):
    return strobe.flash_attn_func(q, k, v, **FIXED, window_size=(7, 0), keep_first=2, **options)


def packed(strobe, q, k, v):
    cu = torch.tensor([0, 150, 150, 400], dtype=torch.int32, device=q.device)
    return strobe.flash_attn_varlen_func(*(x.flatten(0, 1) for x in (q, k, v)), cu, cu, 250, 250, **FIXED)


def with_lse(strobe, q, k, v):
    sinks = torch.arange(4.0, device=q.device)
    out, lse, _ = strobe.flash_attn_func(q, k, v, return_attn_probs=True, s_aux=sinks, deterministic=True)
    return torch.cat((out.float().flatten(), lse.flatten()))


def softcapped(strobe, q, k, v):
    slopes = torch.tensor([0.5, 0.25, 0.1, 0.0], device=q.device)
    return dense(strobe, q, k, v, softcap=3.0, alibi_slopes=slopes, full_from=11)


CALLS = dict(dense=dense, packed=packed, with_lse=with_lse, softcapped=softcapped)
EACH = [dict(call=name) for name in CALLS]


def loss(call, strobe, *inputs):
    return CALLS[call](strobe, *inputs).float().square().sum()


def expected(call, strobe, inputs):
    return torch.autograd.grad(loss(call, strobe, *inputs), inputs)


@scenario([dict(call=c, backend=b, dynamic=d) for c in CALLS for b in ("aot_eager", "inductor") for d in (False, True)])
def compiled(strobe, call, backend, dynamic):
    torch._dynamo.reset()
    inputs = qkv(grad=True)

    def run(*inputs):
        return CALLS[call](strobe, *inputs)

    out = torch.compile(run, fullgraph=True, backend=backend, dynamic=dynamic)(*inputs)
    same_bits(out, run(*inputs))
    dout = torch.randn_like(out)
    same_bits(torch.autograd.grad(out, inputs, dout), torch.autograd.grad(run(*inputs), inputs, dout))


@scenario()
def compiled_cache_call(strobe):
    torch._dynamo.reset()

    def step(q, k_cache, v_cache, k, v, lengths):
        return strobe.flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=lengths, causal=True)

    q, k, v = (randn(2, 1, heads, 64) for heads in (4, 2, 2))
    caches = [randn(2, 300, 2, 64) for _ in range(2)]
    others = [c.clone() for c in caches]
    lengths = ints(3, 270)
    run = torch.compile(step, fullgraph=True, backend="inductor")
    same_bits(run(q, *others, k, v, lengths), step(q, *caches, k, v, lengths))
    same_bits(others, caches)


@scenario()
def compiled_into_graphs(strobe):
    """mode="reduce-overhead" captures what it compiled."""
    torch._dynamo.reset()
    inputs = qkv()
    run = torch.compile(functools.partial(dense, strobe), fullgraph=True, mode="reduce-overhead")
    for _ in range(4):
        inputs = [torch.randn_like(x) for x in inputs]
        same_bits(run(*inputs).clone(), dense(strobe, *inputs))


def _operator_arguments(requires_grad):
    from strobe._extension import Options, Side
    from strobe._operators import _pack

    q, k, v = qkv(9, dims=(16, 16), grad=requires_grad)
    s_aux = torch.randn(4, device="cuda", requires_grad=requires_grad)
    side = Side(alibi_slopes=torch.rand(4, device="cuda"), full_from=ints(3, 5))
    options = Options("flash_attn_func", causal=True, window_size=(4, 0), deterministic=True)
    return q, k, v, s_aux, _pack(side, options, None)


@scenario([dict(requires_grad=False), dict(requires_grad=True)])
def opcheck_forward(strobe, requires_grad):
    q, k, v, s_aux, rest = _operator_arguments(requires_grad)
    torch.library.opcheck(torch.ops.strobe.fwd.default, (q, k, v, s_aux, *rest))


@scenario()
def opcheck_backward_and_cache(strobe):
    q, k, v, s_aux, rest = _operator_arguments(False)
    out, lse = torch.ops.strobe.fwd(q, k, v, s_aux, *rest)
    torch.library.opcheck(torch.ops.strobe.bwd.default, (q, lse, q, k, v, out, lse, s_aux, *rest))
    caches = randn(2, 12, 2, 16), randn(2, 12, 4, 16)
    new = randn(2, 1, 2, 16), randn(2, 1, 4, 16)
    rest = list(rest)
    rest[3] = ints(4, 11)
    arguments = (q[:, :1].contiguous(), *caches, s_aux, *rest, *new, None, None, True)
    torch.library.opcheck(torch.ops.strobe.kvcache.default, arguments)


@scenario(EACH)
def func_grad(strobe, call):
    inputs = qkv(grad=True)
    plain = [x.detach() for x in inputs]
    ours = torch.func.grad(functools.partial(loss, call, strobe), argnums=(0, 1, 2))(*plain)
    same_bits(ours, expected(call, strobe, inputs))


@scenario(EACH)
def vmap_and_vmap_of_grad(strobe, call):
    inputs = qkv()
    stacked = [torch.stack((x, 2 * x)) for x in inputs]
    values = torch.func.vmap(functools.partial(CALLS[call], strobe))(*stacked)
    gradient = torch.func.grad(functools.partial(loss, call, strobe), argnums=(0, 1, 2))
    gradients = torch.func.vmap(gradient)(*stacked)
    for n in range(2):
        entry = [x[n].clone().requires_grad_() for x in stacked]
        same_bits(values[n], CALLS[call](strobe, *entry))
        same_bits([g[n] for g in gradients], expected(call, strobe, entry))


@scenario(EACH)
def dispatch_modes_see_the_call(strobe, call):
    seen = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    inputs = qkv(grad=True)
    with Recorder():
        gradients = expected(call, strobe, inputs)
    assert "strobe.fwd.default" in seen and "strobe.bwd.default" in seen
    same_bits(gradients, expected(call, strobe, inputs))


@scenario([dict(use_reentrant=False), dict(use_reentrant=True)])
def activation_checkpointing(strobe, use_reentrant):
    inputs = qkv(grad=True)
    out = checkpoint(functools.partial(dense, strobe), *inputs, use_reentrant=use_reentrant)
    out.float().square().sum().backward()
    same_bits([x.grad for x in inputs], expected("dense", strobe, inputs))


@scenario()
def checkpointed_dropout_draws_the_same_mask(strobe):
    inputs = qkv(grad=True)

    def run(*inputs):
        return strobe.flash_attn_func(*inputs, dropout_p=0.5, deterministic=True)

    results = []
    for call in (run, functools.partial(checkpoint, run, use_reentrant=False)):
        torch.manual_seed(7)
        results.append(torch.autograd.grad(call(*inputs).float().square().sum(), inputs))
    same_bits(*results)


@scenario([dict(dtype=d) for d in (torch.bfloat16, torch.float16)])
def autocast(strobe, dtype):
    inputs = qkv(dtype=torch.float32, grad=True)
    with torch.autocast("cuda", dtype):
        out = dense(strobe, *inputs)
    cast = dense(strobe, *(x.to(dtype) for x in inputs))
    assert out.dtype == dtype
    same_bits(out, cast)
    gradients = torch.autograd.grad(out.float().square().sum(), inputs)
    assert all(g.dtype == torch.float32 for g in gradients)
    same_bits(gradients, torch.autograd.grad(cast.float().square().sum(), inputs))


@scenario([dict(dtype=d) for d in (torch.bfloat16, torch.float16)])
def dropout_with_cuda_as_the_default_device(strobe, dtype):
    """The draw is made where torch's default generator is, whatever device new tensors have."""
    inputs = qkv(dtype=dtype)
    torch.manual_seed(5)
    expected_out, _, probs = strobe.flash_attn_func(*inputs, dropout_p=0.3, return_attn_probs=True)
    torch.manual_seed(5)
    with torch.device("cuda"):
        out, _, others = strobe.flash_attn_func(*inputs, dropout_p=0.3, return_attn_probs=True)
    same_bits([out, others], [expected_out, probs])


@scenario()
def gradients_that_are_expanded_or_strided(strobe):
    inputs = qkv(grad=True)
    out = dense(strobe, *inputs)
    dense_dout = torch.randn_like(out)
    strided = dense_dout.transpose(1, 3).contiguous().transpose(1, 3)
    one = torch.ones((), device="cuda", dtype=out.dtype)
    for dout in (strided, one.expand(out.shape)):
        ours = torch.autograd.grad(out, inputs, dout, retain_graph=True)
        same_bits(ours, torch.autograd.grad(out, inputs, dout.contiguous(), retain_graph=True))


@scenario([dict(how=how) for how in ("kvpacked", "qkvpacked", "varlen_kvpacked", "varlen_qkvpacked")])
def packed_arguments(strobe, how):
    q, k, v = (randn(2, 200, 4, 64) for _ in range(3))
    cu = ints(0, 150, 400)
    if how.startswith("varlen"):
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        lengths, plain = (cu, cu, 250, 250), strobe.flash_attn_varlen_func(q, k, v, cu, cu, 250, 250, **FIXED)
    else:
        lengths, plain = (), strobe.flash_attn_func(q, k, v, **FIXED)
    if how.endswith("qkvpacked"):
        tensors = (torch.stack((q, k, v), -3),)
        lengths = lengths[1::2]
    else:
        tensors = (q, torch.stack((k, v), -3))
    same_bits(getattr(strobe, f"flash_attn_{how}_func")(*tensors, *lengths, **FIXED), plain)


@scenario([dict(how=how) for how in ("contiguous", "transposed", "sliced")])
def out_is_written_in_place(strobe, how):
    q, k, v = qkv(dims=(64, 96))
    plain = strobe.flash_attn_func(q, k, v, **FIXED)
    wide = torch.full((2, 200, 6, 112), float("nan"), dtype=q.dtype, device="cuda")
    out = dict(
        contiguous=torch.full_like(plain, float("nan")),
        transposed=torch.full_like(plain.transpose(1, 2).contiguous(), float("nan")).transpose(1, 2),
        sliced=wide[:, :, 1:5, 8:104],
    )[how]
    result = strobe.flash_attn_func(q, k, v, out=out, **FIXED)
    assert result.data_ptr() == out.data_ptr()
    same_bits(out.contiguous(), plain)
    assert wide.isnan().sum() == wide.numel() - (plain.numel() if how == "sliced" else 0)


@scenario()
def second_derivatives_are_refused(strobe):
    inputs = qkv(grad=True)
    (gradient,) = torch.autograd.grad(loss("dense", strobe, *inputs), inputs[0], create_graph=True)
    raises(RuntimeError, "second derivatives are not implemented", lambda: gradient.sum().backward())


@scenario()
def inference_tensors_and_parameters(strobe):
    q = torch.nn.Parameter(randn(1, 50, 2, 64))
    strobe.flash_attn_func(q, q, q).sum().backward()
    assert q.grad is not None and q.grad.float().abs().sum() > 0
    with torch.inference_mode():
        x = randn(1, 50, 2, 64)
        assert strobe.flash_attn_func(x, x, x).is_inference()


@scenario()
def torchs_switch_for_determinism(strobe):
    """Adds of dQ in any order would differ somewhere among 4 x 1000 x 8 x 64 numbers."""
    inputs = [randn(4, 1000, 8, 64).requires_grad_() for _ in range(3)]

    def gradients(**options):
        out = strobe.flash_attn_func(*inputs, **options)
        return torch.cat([g.flatten() for g in torch.autograd.grad(out.float().square().sum(), inputs)])

    expected = gradients(deterministic=True)
    torch.use_deterministic_algorithms(True)
    try:
        same_bits(gradients(), expected)
    finally:
        torch.use_deterministic_algorithms(False)
