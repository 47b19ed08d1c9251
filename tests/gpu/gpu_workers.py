"""How many processes the suite has on this machine: one a processor, and few enough for the GPU's memory.

Most of them take 5 GiB of it at once (tests/gpu/arena.py); half of what is free is for that, the rest for what tests
allocate. The first six are of the other kind (tests/gpu/pool.py).
"""

import os
import subprocess

ARENA_MIB, OTHERS = 5.5 * 1024, 6
QUERY = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits"]


def workers(processors, free_mib):
    return max(2, min(processors - 1, OTHERS + max(1, int(free_mib / 2 // ARENA_MIB))))


def free_mib():
    """Of the first GPU, which has most of the tests; that of a large one if nobody says."""
    try:
        return float(subprocess.run(QUERY, capture_output=True, text=True, timeout=30).stdout.splitlines()[0])
    except (OSError, subprocess.TimeoutExpired, IndexError, ValueError):
        return 140e3


def default_workers():
    return workers(os.cpu_count() or 4, free_mib())
