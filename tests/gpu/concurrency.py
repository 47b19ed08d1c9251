"""Streams, threads, processes and devices."""

import os
import subprocess
import sys
import tempfile
import threading

import torch
from scenario import Skip, ints, qkv, randn, same_bits, scenario

DELAY = 50_000_000  # cycles: tens of milliseconds


def _gradients(strobe, inputs, **options):
    out = strobe.flash_attn_func(*inputs, causal=True, deterministic=True, **options)
    return [out, *torch.autograd.grad(out, inputs, torch.ones_like(out))]


@scenario([dict(name=name) for name in ("forward", "gradients", "cache")])
def work_goes_to_the_current_stream(strobe, name):
    """Inputs become right late on a side stream: a kernel on any other stream would read them too early."""
    values = qkv(256)
    inputs = [torch.zeros_like(x).requires_grad_(name == "gradients") for x in values]

    def call(tensors):
        if name == "gradients":
            return _gradients(strobe, tensors)
        if name == "forward":
            return [strobe.flash_attn_func(*tensors)]
        q, k, v = tensors
        return [strobe.flash_attn_with_kvcache(q[:, :1].contiguous(), k, v, cache_seqlens=200)]

    expected = call([x.clone().requires_grad_(name == "gradients") for x in values])
    call(inputs)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(DELAY)
        with torch.no_grad():
            for x, value in zip(inputs, values, strict=True):
                x.copy_(value)
        results = call(inputs)
    torch.cuda.current_stream().wait_stream(side)
    same_bits(results, expected)


@scenario()
def calls_on_several_streams_at_once(strobe):
    """Split forwards and backwards with their workspaces, in flight together."""
    many = [qkv(300 + 16 * n, grad=True) for n in range(6)]
    wide = [(randn(1, 1, 8, 128), randn(1, 9000, 2, 128), randn(1, 9000, 2, 128)) for _ in range(6)]
    expected = [(_gradients(strobe, a), strobe.flash_attn_func(*b)) for a, b in zip(many, wide, strict=True)]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in many]
    for _ in range(5):
        results = []
        for stream, a, b in zip(streams, many, wide, strict=True):
            with torch.cuda.stream(stream):
                results.append((_gradients(strobe, a), strobe.flash_attn_func(*b)))
        torch.cuda.synchronize()
        for (ga, oa), (gb, ob) in zip(results, expected, strict=True):
            same_bits(ga, gb)
            same_bits(oa, ob)


@scenario([dict(cold=False), dict(cold=True)])
def threads(strobe, cold):
    """Eight threads, each on its own stream; cold: all of them want the same kernels, which nobody has made."""
    inputs = qkv(200, dims=(168, 24) if cold else (64, 64), grad=True)
    expected = None if cold else _gradients(strobe, inputs)
    results, failures = [None] * 8, []
    torch.cuda.synchronize()

    def work(n):
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(1 if cold else 10):
                    results[n] = _gradients(strobe, [x.detach().requires_grad_() for x in inputs])
        except Exception as error:
            failures.append(error)

    workers = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    torch.cuda.synchronize()
    assert not failures, failures
    for result in results:
        same_bits(result, expected or results[0])


@scenario()
def devices(strobe):
    """The tensors' device counts, not the current one."""
    if torch.cuda.device_count() < 2:
        raise Skip("one GPU")
    first = qkv(200, grad=True)
    expected = _gradients(strobe, first)
    for current in range(2):
        with torch.cuda.device(current):
            for device in ("cuda:1", "cuda:0"):
                inputs = [x.detach().to(device).requires_grad_() for x in first]
                results = _gradients(strobe, inputs)
                assert all(r.device == torch.device(device) for r in results)
                same_bits([r.to("cuda:0") for r in results], expected)
                cache = [x.detach() for x in inputs]
                out = strobe.flash_attn_with_kvcache(
                    cache[0][:, :1].contiguous(), *cache[1:], cache_seqlens=ints(100, 7, device=device)
                )
                assert out.device == torch.device(device)
            assert torch.cuda.current_device() == current


FIRST_CALL = """
import sys, time
import torch, strobe
q = torch.ones(1, 64, 2, 184, dtype=torch.bfloat16, device="cuda")
torch.cuda.synchronize()
begin = time.perf_counter()
strobe.flash_attn_func(q, q, q)
torch.cuda.synchronize()
print(time.perf_counter() - begin)
"""


@scenario()
def kernels_come_from_the_disk_in_a_second_process(strobe):
    with tempfile.TemporaryDirectory() as folder:
        site = os.path.dirname(os.path.dirname(strobe.__file__))
        path = os.pathsep.join([site, os.environ.get("PYTHONPATH", "")])
        command = [sys.executable, "-c", FIRST_CALL]
        for env in (
            dict(STROBE_CACHE_DIR=folder),
            dict(STROBE_CACHE_DIR=folder, STROBE_DISABLE_JIT="1"),
        ):
            done = subprocess.run(
                command, env={**os.environ, "PYTHONPATH": path, **env}, capture_output=True, text=True, timeout=120
            )
            assert done.returncode == 0, done.stderr[-2000:]
        empty = {**os.environ, "PYTHONPATH": path, "STROBE_CACHE_DIR": folder + "/none", "STROBE_DISABLE_JIT": "1"}
        done = subprocess.run(command, env=empty, capture_output=True, text=True, timeout=120)
        assert done.returncode != 0 and "STROBE_DISABLE_JIT is set" in done.stderr, done.stderr[-2000:]
