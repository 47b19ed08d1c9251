"""Every route by which torch may reach attention gives what a plain eager call gives, or refuses."""

import functools
import pathlib
import subprocess
import sys

import pytest
import torch
from torch.testing._internal.optests import fake_check
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

HERE = pathlib.Path(__file__).parent


@pytest.fixture
def qkv():
    return [torch.randn(2, 20, heads, 16, requires_grad=True) for heads in (4, 2, 4)]


def dense(strobe, q, k, v, **options):
    return strobe.flash_attn_func(q, k, v, **{"causal": True, "window_size": (7, 0), "keep_first": 2, **options})


def packed(strobe, q, k, v):
    cu_seqlens = torch.tensor([0, 13, 13, 40], dtype=torch.int32)
    flat = (x.flatten(0, 1) for x in (q, k, v))
    return strobe.flash_attn_varlen_func(*flat, cu_seqlens, cu_seqlens, 27, 27, causal=True)


def with_lse(strobe, q, k, v):
    out, lse, _ = strobe.flash_attn_func(q, k, v, return_attn_probs=True, s_aux=torch.arange(4.0))
    return torch.cat((out.flatten(), lse.flatten()))


def softcapped(strobe, q, k, v):
    return dense(strobe, q, k, v, softcap=3.0, alibi_slopes=torch.tensor([0.5, 0.25, 0.1, 0.0]), full_from=11)


calls = pytest.mark.parametrize("call", [dense, packed, with_lse, softcapped])


def loss(call, strobe, *qkv):
    return call(strobe, *qkv).square().sum()


def expected(call, strobe, qkv):
    return torch.autograd.grad(loss(call, strobe, *qkv), qkv)


def assert_same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


@calls
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(strobe, qkv, call, backend, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(functools.partial(loss, call, strobe), fullgraph=True, backend=backend, dynamic=dynamic)
    assert_same(torch.autograd.grad(compiled(*qkv), qkv), expected(call, strobe, qkv))


def test_compile_serves_other_lengths_without_compiling_again(strobe):
    torch._dynamo.reset()
    compiled = torch.compile(functools.partial(dense, strobe), fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (9, 33, 64):
        q, k, v = (torch.randn(2, length, 2, 8) for _ in range(3))
        assert torch.equal(compiled(q, k, v), dense(strobe, q, k, v))


def test_compiled_dropout_has_the_gradient_of_its_own_mask(strobe, qkv):
    torch._dynamo.reset()
    q, k, v = qkv
    ones = torch.ones_like(v)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(q, k, v):
        return strobe.flash_attn_func(q, k, v, dropout_p=0.5)

    # out = P v with P fixed by the draw: v's gradient for dout is P^T dout, so <out, dout> = <v, dv>.
    out = run(q, k, v)
    dout = torch.randn_like(out)
    (dv,) = torch.autograd.grad(out, v, dout)
    torch.testing.assert_close((out * dout).sum(), (v * dv).sum(), rtol=1e-4, atol=1e-4)
    assert not torch.equal(run(q, k, ones), run(q, k, ones))


def test_compile_cache_call(strobe):
    torch._dynamo.reset()

    def step(q, k_cache, v_cache, k, v, lengths):
        return strobe.flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=lengths, causal=True)

    q, k, v = (torch.randn(2, 1, 2, 8) for _ in range(3))
    caches = [torch.randn(2, 16, 2, 8) for _ in range(2)]
    compiled_caches = [c.clone() for c in caches]
    lengths = torch.tensor([3, 7], dtype=torch.int32)
    compiled = torch.compile(step, fullgraph=True, backend="inductor")
    assert torch.equal(compiled(q, *compiled_caches, k, v, lengths), step(q, *caches, k, v, lengths))
    assert_same(compiled_caches, caches)


@calls
@pytest.mark.parametrize("strict", [False, True])
def test_export(strobe, qkv, call, strict):
    class Module(torch.nn.Module):
        def forward(self, q, k, v):
            return call(strobe, q, k, v)

    plain = tuple(x.detach() for x in qkv)
    program = torch.export.export(Module(), plain, strict=strict)
    assert "strobe.fwd" in str(program.graph)
    assert torch.equal(program.module()(*plain), call(strobe, *plain))


def test_jit_trace_keeps_the_call(strobe, qkv):
    plain = tuple(x.detach() for x in qkv)

    def call(q, k, v):
        return dense(strobe, q, k, v)

    traced = torch.jit.trace(call, plain, check_trace=False)
    other = tuple(2 * x for x in plain)
    assert torch.equal(traced(*other), dense(strobe, *other))


def _operator_arguments(strobe, requires_grad, **options):
    from strobe._extension import Options, Side
    from strobe._operators import _pack

    q, k, v = (torch.randn(2, 9, heads, 16, requires_grad=requires_grad) for heads in (4, 2, 4))
    s_aux = torch.randn(4, requires_grad=requires_grad)
    side = Side(alibi_slopes=torch.rand(4), full_from=torch.tensor([3, 5], dtype=torch.int32))
    return q, k, v, s_aux, side, _pack(side, Options("flash_attn_func", causal=True, window_size=(4, 0)), None)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck_forward(strobe, requires_grad):
    q, k, v, s_aux, _, rest = _operator_arguments(strobe, requires_grad)
    torch.library.opcheck(torch.ops.strobe.fwd.default, (q, k, v, s_aux, *rest))


def test_opcheck_backward_and_cache(strobe):
    q, k, v, s_aux, _, rest = _operator_arguments(strobe, False)
    out, lse = torch.ops.strobe.fwd(q, k, v, s_aux, *rest)
    torch.library.opcheck(torch.ops.strobe.bwd.default, (q, lse, q, k, v, out, lse, s_aux, *rest))
    k_cache, v_cache = torch.randn(2, 12, 2, 16), torch.randn(2, 12, 4, 16)
    new = (torch.randn(2, 1, 2, 16), torch.randn(2, 1, 4, 16))
    rest = list(rest)
    rest[3] = torch.tensor([4, 11], dtype=torch.int32)
    arguments = (q[:, :1].contiguous(), k_cache, v_cache, s_aux, *rest, *new, None, None, True)
    torch.library.opcheck(torch.ops.strobe.kvcache.default, arguments)


@calls
def test_fake_tensors_have_the_shapes_of_real_ones(strobe, qkv, call):
    fake_check(functools.partial(call, strobe), tuple(x.detach() for x in qkv), {})


def test_dispatch_modes_see_the_call(strobe, qkv):
    seen = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    with Recorder():
        gradients = expected(dense, strobe, qkv)
    assert "strobe.fwd.default" in seen and "strobe.bwd.default" in seen
    assert_same(gradients, expected(dense, strobe, qkv))


@calls
def test_func_grad(strobe, qkv, call):
    plain = [x.detach() for x in qkv]
    ours = torch.func.grad(functools.partial(loss, call, strobe), argnums=(0, 1, 2))(*plain)
    assert_same(ours, expected(call, strobe, qkv))


@calls
def test_vmap_and_vmap_of_grad(strobe, qkv, call):
    stacked = [torch.stack((x.detach(), 2 * x.detach())) for x in qkv]
    values = torch.func.vmap(functools.partial(call, strobe))(*stacked)
    gradient = torch.func.grad(functools.partial(loss, call, strobe), argnums=(0, 1, 2))
    gradients = torch.func.vmap(gradient)(*stacked)
    for n in range(2):
        entry = [x[n].clone().requires_grad_() for x in stacked]
        assert torch.equal(values[n], call(strobe, *entry))
        assert_same([g[n] for g in gradients], expected(call, strobe, entry))


def test_vmap_over_one_input(strobe, qkv):
    q, k, v = (x.detach() for x in qkv)
    mapped = torch.func.vmap(lambda q: dense(strobe, q, k, v))(torch.stack((q, q + 1)))
    assert torch.equal(mapped[1], dense(strobe, q + 1, k, v))


def test_batched_gradients(strobe, qkv):
    out = dense(strobe, *qkv)
    douts = torch.randn(3, *out.shape)
    batched = torch.autograd.grad(out, qkv, douts, is_grads_batched=True, retain_graph=True)
    for n in range(3):
        assert_same([g[n] for g in batched], torch.autograd.grad(out, qkv, douts[n], retain_graph=True))


def test_functionalize(strobe, qkv):
    plain = [x.detach() for x in qkv]
    assert torch.equal(torch.func.functionalize(functools.partial(dense, strobe))(*plain), dense(strobe, *plain))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(strobe, qkv, use_reentrant):
    checkpoint(functools.partial(dense, strobe), *qkv, use_reentrant=use_reentrant).square().sum().backward()
    assert_same([x.grad for x in qkv], expected(dense, strobe, qkv))


def test_checkpointed_dropout_draws_the_same_mask(strobe, qkv):
    def run(*qkv):
        return strobe.flash_attn_func(*qkv, dropout_p=0.5)

    torch.manual_seed(7)
    plain = torch.autograd.grad(run(*qkv).square().sum(), qkv)
    torch.manual_seed(7)
    assert_same(torch.autograd.grad(checkpoint(run, *qkv, use_reentrant=False).square().sum(), qkv), plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(strobe, qkv, dtype):
    with torch.autocast("cpu", dtype):
        out = dense(strobe, *qkv)
    cast = dense(strobe, *(x.to(dtype) for x in qkv))
    assert out.dtype == dtype and torch.equal(out, cast)
    gradients = torch.autograd.grad(out.float().square().sum(), qkv)
    assert all(g.dtype == torch.float32 for g in gradients)
    assert_same(gradients, torch.autograd.grad(cast.float().square().sum(), qkv))


def test_saved_tensor_hooks_reach_every_saved_tensor(strobe, qkv):
    seen = []

    def pack(t):
        seen.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = dense(strobe, *qkv)
    assert any(t.data_ptr() == out.data_ptr() for t in seen)
    assert {tuple(t.shape) for t in seen} >= {(2, 20, 4, 16), (2, 20, 2, 16), (2, 4, 20)}


def test_tensors_changed_in_place_before_backward_are_noticed(strobe, qkv):
    k = qkv[1].detach().clone()
    out = dense(strobe, qkv[0], k, qkv[2])
    k.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_negated_views_are_read_with_their_sign(strobe):
    z = torch.randn(1, 5, 2, 1, dtype=torch.complex64)
    q = z.conj().imag
    assert q.is_neg()
    k = torch.randn(1, 5, 2, 1)
    assert torch.equal(strobe.flash_attn_func(q, k, k), strobe.flash_attn_func(q.resolve_neg(), k, k))


def test_parameters_and_inference_tensors(strobe):
    q = torch.nn.Parameter(torch.randn(1, 5, 2, 8))
    strobe.flash_attn_func(q, q, q).sum().backward()
    assert q.grad is not None and q.grad.abs().sum() > 0
    with torch.inference_mode():
        x = torch.randn(1, 5, 2, 8)
        assert strobe.flash_attn_func(x, x, x).is_inference()


def test_subclasses_go_through_the_operator(strobe):
    class Wrapped(torch.Tensor):
        pass

    x = torch.randn(1, 5, 2, 8)
    assert torch.equal(
        torch.Tensor(strobe.flash_attn_func(*[x.as_subclass(Wrapped)] * 3)), strobe.flash_attn_func(x, x, x)
    )


def test_meta_and_sparse_tensors(strobe):
    x = torch.randn(1, 5, 2, 8, device="meta")
    with pytest.raises((TypeError, NotImplementedError), match="flash_attn_func|strobe::fwd"):
        strobe.flash_attn_func(x, x, x)
    y = torch.randn(1, 5, 2, 8).to_sparse()
    with pytest.raises(TypeError, match="flash_attn_func: q is a tensor without memory"):
        strobe.flash_attn_func(y, y, y)


def test_forward_mode_is_refused(strobe, qkv):
    q = qkv[0].detach()
    with pytest.raises(NotImplementedError, match="flash_attn_func: forward-mode"):
        torch.func.jvp(lambda q: strobe.flash_attn_func(q, q, q), (q,), (q,))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(q, q)
        with pytest.raises(NotImplementedError, match="flash_attn_func: forward-mode"):
            strobe.flash_attn_func(dual, q, q)


@pytest.mark.parametrize("compiled", [False, True])
def test_second_derivatives_are_refused(strobe, qkv, compiled):
    run = functools.partial(loss, dense, strobe)
    if compiled:
        torch._dynamo.reset()
        run = torch.compile(run, fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match="second derivatives are not implemented|does not currently support double"):
        (gradient,) = torch.autograd.grad(run(*qkv), qkv[0], create_graph=True)
        gradient.sum().backward()


def test_compiled_func_grad_is_right_or_refused(strobe, qkv):
    torch._dynamo.reset()
    plain = [x.detach() for x in qkv]
    gradient = torch.compile(torch.func.grad(functools.partial(loss, dense, strobe)), backend="aot_eager")
    try:
        ours = gradient(*plain)
    except Exception as error:
        assert "setup_context" in str(error) or "strobe" in str(error)
        return
    assert torch.equal(ours, expected(dense, strobe, qkv)[0])


def test_threads_are_those_of_torch(strobe):
    q, k, v = (torch.randn(2, 200, 4, 32) for _ in range(3))
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(strobe.flash_attn_func(q, k, v, causal=True))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_dtensor_sharded_over_heads():
    """Two processes, half of the heads each: the same values and gradients, and no communication of q, k or v."""
    done = subprocess.run(
        [sys.executable, str(HERE / "dtensor_worker.py")], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("same") == 2, done.stdout + done.stderr
