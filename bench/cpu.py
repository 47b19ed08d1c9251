"""The benchmark of the CPU engine: its grid, its marks, and what this machine can do at best."""

import os
import platform
from pathlib import Path

import torch

import strobe
from bench.cases import Case, Task, in_unit, make_inputs
from bench.marks import Mark, at_least, at_most, geomean_speedup, geomean_time, largest, largest_excess
from bench.measure import first_calls, measure, measure_host
from bench.memory import measure_memory
from bench.page import tables  # noqa: F401  part of what a machine is
from bench.peers import SYSTEMS, check_agreement, systems_for

DTYPES = ("fp32", "bf16")


def grid(suite, kind, quick):
    lengths = (1024,) if quick else (1024, 2048, 4096, 8192)
    return [
        Task(suite, kind, Case((s,), None, dtype, d, heads=8, causal=causal), "GFLOP/s")
        for dtype in DTYPES
        for d in (64, 128)
        for causal in (False, True)
        for s in lengths
    ]


def window(quick):
    # Two heads: SDPA computes every pair under its mask, and its gradient takes seconds per head.
    s = 2048 if quick else 8192
    return [
        Task("window", kind, Case((s,), None, dtype, d, heads=2, causal=True, window=(512, 0), keep_first=4), "GFLOP/s")
        for kind in ("forward", "backward")
        for dtype in DTYPES
        for d in (64, 128)
    ]


def decode(quick):
    batch, keys, long = (2, 2048, 16384) if quick else (8, 8192, 131072)
    tasks = []
    for dtype in DTYPES:
        base = dict(dtype=dtype, head_dim=128, heads=8, causal=True)
        cache = ((1,) * batch, (keys,) * batch)
        tasks += [
            Task("decode", "decode", Case(*cache, **base), "GB/s"),
            Task("decode", "decode", Case(*cache, **base, layout="paged", page_size=16), "GB/s"),
            Task("decode", "decode", Case((1,), (long,), **base, window=(2000, 0), keep_first=10), "ms"),
            Task("decode", "decode", Case((1,), (2011,), **base), "ms"),
        ]
    return tasks


def memory(quick):
    s = 8192 if quick else 65536
    return [Task("memory", "memory", Case((s,), None, dtype, 64, heads=1, causal=True), "MB") for dtype in DTYPES]


def host(quick):
    tiny = Case((1,), None, "fp32", 8, heads=1)
    return [Task("host", "host", tiny, "us"), Task("host", "host_grad", tiny, "us")]


def suites(quick):
    return {
        "fwd": grid("fwd", "forward", quick),
        "bwd": grid("bwd", "backward", quick),
        "window": window(quick),
        "decode": decode(quick),
        "memory": memory(quick),
        "host": host(quick),
    }


def chosen(suite, **wanted):
    """Tasks of a suite whose attributes, or whose case's, are these."""

    def select(task):
        return task.suite == suite and all(
            getattr(task, k, getattr(task.case, k, None)) == v for k, v in wanted.items()
        )

    return select


def marks():
    speedup, share = geomean_speedup("sdpa"), geomean_time("sdpa")
    excess = largest_excess("strobe", "drop-in")
    plain = dict(layout="dense", window=(-1, -1), unit="GB/s")
    return [
        Mark("forward fp32", chosen("fwd", dtype="fp32"), speedup, at_least(1.1)),
        Mark("backward fp32", chosen("bwd", dtype="fp32"), speedup, at_least(1.3)),
        Mark("forward bf16", chosen("fwd", dtype="bf16"), speedup, at_least(1.2)),
        Mark("backward bf16", chosen("bwd", dtype="bf16"), speedup, at_least(2.5)),
        Mark("decode fp32", chosen("decode", dtype="fp32", **plain), speedup, at_least(1.3)),
        Mark("decode bf16", chosen("decode", dtype="bf16", **plain), speedup, at_least(8.0)),
        Mark("window forward", chosen("window", kind="forward"), speedup, at_least(6.0)),
        Mark("window backward", chosen("window", kind="backward"), speedup, at_least(6.0)),
        Mark("extra memory, MB", chosen("memory"), largest(), at_most(64.0)),
        Mark("host time without grad, of SDPA's", chosen("host", kind="host"), share, at_most(0.5)),
        Mark("host time with grad, of SDPA's", chosen("host", kind="host_grad"), share, at_most(1.0)),
        Mark("host time of the drop-in over Strobe's, us", chosen("host"), excess, at_most(2)),
    ]


def name(device):
    return "cpu"


def device():
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    model = models[0] if models else platform.machine()
    return f"{model}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads, {strobe._C.cpu_isa()}"


def best(call):
    once, _ = first_calls({"it": call})
    return measure({"it": call}, once, budget=1.0)["it"]


def ceiling():
    """The best that this run saw: PyTorch's matrix product, and copying 256 MB (bytes read and bytes written)."""
    n = 2048
    found = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a, b, c = (torch.randn(n, n).to(dtype) for _ in range(3))
        found[f"matmul {name} GFLOP/s"] = 2 * n**3 / best(lambda: torch.mm(a, b, out=c)) / 1e9
    source = torch.ones(64 << 20)
    target = torch.empty_like(source)
    found["copy GB/s"] = 2 * source.nbytes / best(lambda: target.copy_(source)) / 1e9
    return found


def versions():
    return {}


def sources():
    return None


def notes():
    return []


def close():
    pass


def choose(names):
    for name in set(SYSTEMS) - set(names):
        del SYSTEMS[name]


def run(task, budget):
    """{system: figure in the task's unit}."""
    systems = systems_for(task)
    if task.kind == "memory":
        return {name: measure_memory(name, task.case) / 1e6 for name in systems}
    inputs = make_inputs(task.case)
    prepared = {name: system(task, inputs) for name, system in systems.items()}
    prepared = {name: p for name, p in prepared.items() if p}
    calls = {name: p.call for name, p in prepared.items()}
    once, returned = first_calls(calls)
    check_agreement(task, {name: p.results(returned.pop(name)) for name, p in prepared.items()})
    if task.kind == "host":
        with torch.no_grad():
            seconds = measure_host(calls, budget)
    elif task.kind == "host_grad":
        seconds = measure_host(calls, budget)
    else:
        seconds = measure(calls, once, budget)
    return {name: in_unit(task, value) for name, value in seconds.items()}
