"""CUDA graphs: warm calls are captured and replayed on new values, cold ones say that they want to be warmed up."""

import functools
import threading
import warnings

import torch
from scenario import ints, qkv, raises, randn, same_bits, scenario


def _forward(strobe):
    inputs = qkv(300)
    return inputs, lambda: strobe.flash_attn_func(*inputs, causal=True, window_size=(100, 0), keep_first=4)


def _split(strobe):
    inputs = [randn(1, 1, 8, 128), randn(1, 9000, 2, 128), randn(1, 9000, 2, 128)]
    return inputs, lambda: strobe.flash_attn_func(*inputs)


def _packed(strobe):
    inputs = [randn(330, heads, 64) for heads in (4, 2, 2)]
    cu = ints(0, 100, 100, 330)
    return inputs, lambda: strobe.flash_attn_varlen_func(*inputs, cu, cu, 330, 330, causal=True)


def _decode(strobe):
    inputs = [randn(3, 1, 8, 64), randn(40, 16, 2, 64), randn(40, 16, 2, 64), randn(3, 1, 2, 64), randn(3, 1, 2, 64)]
    table = torch.randperm(40, device="cuda").int()[:36].view(3, 12)
    lengths = ints(5, 100, 180)
    angle = torch.rand(300, 16, device="cuda").bfloat16()

    def call():
        out = strobe.flash_attn_with_kvcache(
            *inputs, angle.cos(), angle.sin(), cache_seqlens=lengths, block_table=table, causal=True
        )
        return out, inputs[1], inputs[2]

    return inputs, call


def _gradients(strobe):
    inputs = qkv(300, grad=True)

    def call():
        out = strobe.flash_attn_func(*inputs, causal=True, deterministic=True)
        return torch.autograd.grad(out, inputs, torch.ones_like(out))

    return inputs, call


CALLS = dict(forward=_forward, split=_split, packed=_packed, decode=_decode, gradients=_gradients)


@scenario([dict(name=name) for name in CALLS])
def replay_on_new_values(strobe, name):
    inputs, call = CALLS[name](strobe)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(2):
            call()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    captured = [captured] if isinstance(captured, torch.Tensor) else list(captured)
    for n in range(3):
        values = [torch.randn_like(x) for x in inputs]
        results = []
        for replayed in (True, False):
            with torch.no_grad():
                for x, value in zip(inputs, values, strict=True):
                    x.copy_(value)
            if replayed:
                for x in captured:
                    if all(x is not y for y in inputs):
                        x.fill_(float("nan"))
                graph.replay()
                results.append([x.clone() for x in captured])
            else:
                eager = call()
                results.append([eager] if isinstance(eager, torch.Tensor) else list(eager))
        same_bits(*results)


def _decode_step(strobe, x, lengths, caches, table):
    """Three layers of a model that needs no matrix product: their outputs go on to the next, new keys into caches."""
    for keys, values in caches:
        q, k, v = x.view(4, 1, 4, 16), x[:, :32].cos().view(4, 1, 2, 16), x[:, 32:].sin().view(4, 1, 2, 16)
        x = strobe.flash_attn_with_kvcache(
            q * 3, keys, values, k, v, cache_seqlens=lengths, block_table=table, causal=True
        ).flatten(1)
    lengths[:3] += 1
    return x.flip(1) + 2 * lengths[:, None].cos().to(x.dtype)  # never settles


@scenario()
def many_decode_steps_in_flight(strobe):
    """As an engine decodes: the graph of a step is replayed without waiting for the one before, beside other work.

    The last row is padding: it has a length of -1, and pages that there are not.
    """
    steps = 40
    table = torch.full((4, 32), -1, dtype=torch.int32, device="cuda")
    table[:3, :7] = torch.randperm(40)[:21].int().view(3, 7).cuda()  # 61 + 40 keys are 7 pages
    caches = [(randn(40, 16, 2, 16), randn(40, 16, 2, 16)) for _ in range(3)]
    x, lengths = randn(4, 64), ints(5, 13, 61, -1)

    def copies():
        return x.clone(), lengths.clone(), [(k.clone(), v.clone()) for k, v in caches]

    token, before, used = copies()
    expected = []
    for _ in range(steps):
        token = _decode_step(strobe, token, before, used, table)
        expected.append(token)
    token, before, used = copies()
    made, place = torch.full((steps, 4, 64), float("nan"), device="cuda", dtype=x.dtype), ints(0).long()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        token.copy_(_decode_step(strobe, token, before, used, table))
        made.index_copy_(0, place, token[None])
        place += 1
    busy, side = randn(4096, 4096), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(20):
            busy @ busy
    for _ in range(steps):
        graph.replay()
    torch.cuda.synchronize()
    same_bits(made[:, :3], torch.stack(expected)[:, :3])


@scenario([dict(name=name) for name in ("forward", "gradients", "cache")])
def cold_capture_asks_to_warm_up(strobe, name):
    """Head dims that no other test uses: their kernels are not loaded."""
    dims = dict(forward=(104, 88), gradients=(120, 56), cache=(136, 8))[name]
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        call = _cold_call(strobe, name, dims)
    side.synchronize()
    with torch.cuda.stream(side):
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin()
        try:
            message = raises((ValueError, RuntimeError), "warm up", call)
        finally:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # nothing was captured
                graph.capture_end()
        assert "is being captured into a graph but" in message, message
        call()  # warms up; afterwards it is captured
        side.synchronize()
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin()
        call()
        graph.capture_end()
        graph.replay()
    side.synchronize()


def _cold_call(strobe, name, dims):
    if name == "cache":
        q, k, v = randn(1, 1, 4, dims[0]), randn(1, 64, 2, dims[0]), randn(1, 64, 2, dims[1])
        return functools.partial(strobe.flash_attn_with_kvcache, q, k, v, cache_seqlens=ints(50))
    q, k, v = qkv(64, dims=dims, grad=name == "gradients")
    call = functools.partial(strobe.flash_attn_func, q, k, v)
    if name == "gradients":
        out = call()
        call = functools.partial(torch.autograd.grad, out, q, torch.ones_like(out), retain_graph=True)
    return call


@scenario()
def capture_beside_a_thread_that_compiles(strobe):
    """Loading a kernel in one thread does not break another thread's capture."""
    inputs, call = _forward(strobe)
    expected = call()
    other = qkv(64, dims=(152, 16))
    begun, loaded = threading.Event(), threading.Event()
    failures = []

    def compile_one():
        begun.wait()
        try:
            strobe.flash_attn_func(*other)
        except Exception as error:
            failures.append(error)
        loaded.set()

    thread = threading.Thread(target=compile_one)
    thread.start()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        begun.set()
        loaded.wait()
        captured = call()
    thread.join()
    assert not failures, failures
    graph.replay()
    same_bits(captured, expected)
