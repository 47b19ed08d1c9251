"""Runs one task on a GPU: every system that can do it is checked, then all are timed together."""

import functools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import bench.gpu_measure as gpu_measure
import bench.gpu_peers as gpu_peers
import strobe
from bench.cases import in_unit
from bench.gpu_inputs import make_inputs
from bench.gpu_reference import Judge

ROOT = Path(__file__).parents[1]
NEVER = 120  # seconds that a process for the first calls may take


def reason(error):
    """One line for a row, without colours."""
    lines = [line for line in re.sub(r"\x1b\[[0-9;]*m", "", str(error)).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].strip() if lines else ''}"[:200]


class Lost(Exception):
    """The device answers nothing any more; this process cannot go on."""


def alive(device):
    if device == "cuda":
        try:
            torch.cuda.synchronize()
        except Exception as error:
            raise Lost(reason(error)) from error


def run_task(task, budget, systems, broken, device="cuda", timer=None, at=lambda name: None):
    """{system: figure, or why it has none}; nothing for a system that cannot do the task.

    `systems`: {name: what prepares}; `broken`: {name: why it is not tried again}; `timer(task, calls, budget)` gives
    seconds; `at(name)` is told whose turn it is, for whoever watches a process that may hang or die.
    """
    if task.suite == "jit":
        return first_calls(task)
    values, calls = dict(broken), {}
    inputs = make_inputs(task, device)
    judge = Judge(task, inputs)
    for name, system in systems.items():
        if name in broken:
            continue
        at(name)
        try:
            prepared = system(task, inputs)
            if prepared is None:
                continue
            judge.check(name, prepared.results(prepared.call()))
            calls[name] = prepared.call
        except Exception as error:
            values[name] = reason(error)
        alive(device)
    at("timing")
    if calls:
        try:
            with torch.set_grad_enabled(task.kind != "host"):
                seconds = (timer or time_calls)(task, calls, budget)
        finally:
            alive(device)
        values |= {name: in_unit(task, value) for name, value in seconds.items()}
    return {name: values[name] for name in systems if name in values}


@functools.cache
def clock():
    return gpu_measure.DeviceClock()


def time_calls(task, calls, budget):
    if task.kind in ("host", "host_grad"):
        return gpu_measure.measure_queueing(calls, budget)
    return gpu_measure.measure_device(calls, budget, clock())


@functools.cache
def fresh_processes():
    """{task's name: seconds} of first calls in a process with an empty cache, and in a second process.

    Medians of three tries: the first of all reads NVRTC from the disk.
    """
    tries = []
    for _ in range(3):
        with tempfile.TemporaryDirectory() as folder:
            tries.append(first_process("new", folder) | first_process("again", folder))
    return {name: statistics.median(times[name] for times in tries) for name in tries[0]}


def first_process(when, cache):
    environment = os.environ | {"STROBE_CACHE_DIR": cache}
    command = [sys.executable, "-m", "bench.gpu_jit", when]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=NEVER)
    if done.returncode:
        raise RuntimeError("a fresh process failed: " + (done.stderr.strip().splitlines() or [""])[-1])
    return json.loads(done.stdout.splitlines()[-1])


def first_calls(task):
    try:
        return {"strobe": in_unit(task, fresh_processes()[task.name])}
    except Exception as error:
        return {"strobe": reason(error)}


# What the process that owns the GPU answers to.


def run(task, budget, names, broken, at):
    systems = {name: gpu_peers.SYSTEMS[name] for name in names if not gpu_peers.load(name)[1]}
    try:
        return run_task(task, budget, systems, broken, at=at)
    finally:
        torch.cuda.empty_cache()


def device():
    info = torch.cuda.get_device_properties(0)
    ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(ask, capture_output=True, text=True, timeout=20).stdout.splitlines()[0].strip()
    except (OSError, IndexError, subprocess.TimeoutExpired):
        driver = "unknown"
    return f"{info.name}, {info.multi_processor_count} SMs, {info.total_memory / 2**30:.0f} GiB, driver {driver}"


def versions():
    found = {"cuda": torch.version.cuda, "cudnn": str(torch.backends.cudnn.version())}
    return found | {name: gpu_peers.load(name)[0] for name in gpu_peers.LOAD if not gpu_peers.load(name)[1]}


def sources():
    """The digest that the GPU tests' receipt holds, if the strobe that runs was built from these sources."""
    sys.path.insert(0, str(ROOT / "scripts"))
    import receipt

    stamp = Path(strobe.__file__).parent / "sources.sha256"
    if not stamp.exists() or stamp.read_text().strip() != receipt.digest(ROOT, ("src", "python")):
        return "unknown: strobe was built from other sources"
    return receipt.digest(ROOT)


def absent():
    """{peer: why it is not there}."""
    return {name: gpu_peers.load(name)[1] for name in gpu_peers.LOAD if gpu_peers.load(name)[1]}


def ceiling():
    """PyTorch's matrix product 8192 cubed, and copying 4 GB (bytes read and bytes written)."""
    n = 8192
    a, b, c = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    source = torch.randn(1 << 30, device="cuda")
    target = torch.empty_like(source)
    calls = {"matmul": lambda: torch.mm(a, b, out=c), "copy": lambda: target.copy_(source)}
    seconds = gpu_measure.measure_device(calls, 0.5, clock())
    torch.cuda.empty_cache()
    return {
        "matmul bf16 TFLOP/s": 2 * n**3 / seconds["matmul"] / 1e12,
        "copy TB/s": 2 * source.nbytes / seconds["copy"] / 1e12,
    }


HANDLERS = {"device": device, "sources": sources, "versions": versions, "absent": absent, "ceiling": ceiling}
