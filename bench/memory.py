"""Extra memory of forward and backward, measured in a process of its own.

The process prepares the inputs, makes the call on a small problem so that threads, libraries and code are there, gives
free heap back, and resets the kernel's record of its highest resident memory (VmHWM). After the call, that
record less what was resident before is everything that the call held at once at its worst moment: saved tensors,
workspace, results. The results (out, dq, dk, dv) are what any implementation returns, so they are subtracted. A
temporary tensor of known size is measured the same way first; if that figure is wrong, no figure is given.

    python -m bench.memory SYSTEM CASE-AS-JSON
"""

import ctypes
import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch

from bench.cases import Case, Task, make_inputs
from bench.peers import SYSTEMS

KNOWN = 64 << 20


def resident(field):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def peak_growth(call):
    """(bytes resident at the worst moment of the call beyond those before it, what it returned)."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from what is resident now
    before = resident("VmRSS")
    result = call()
    return resident("VmHWM") - before, result


def extra_memory(system, case):
    def prepare(case):
        return SYSTEMS[system](Task("memory", "memory", case, "MB"), make_inputs(case))

    prepare(replace(case, seqlens_q=(64,), seqlens_k=(64,))).call()
    known_growth, _ = peak_growth(lambda: torch.ones(KNOWN, dtype=torch.uint8).max())
    if abs(known_growth - KNOWN) > 2 << 20:
        raise RuntimeError(f"a tensor of {KNOWN} bytes measures as {known_growth}")
    prepared = prepare(case)
    growth, results = peak_growth(prepared.call)
    return growth - sum(x.nbytes for x in results)


def measure_memory(system, case):
    """Bytes, from a fresh process."""
    command = [sys.executable, "-m", "bench.memory", system, json.dumps(asdict(case))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise RuntimeError(f"measuring memory of {system} failed:\n{done.stderr}")
    return int(done.stdout)


if __name__ == "__main__":
    fields = {name: tuple(x) if isinstance(x, list) else x for name, x in json.loads(sys.argv[2]).items()}
    print(extra_memory(sys.argv[1], Case(**fields)))
