"""Time on a GPU: events around a call, behind a flushed L2 and behind enough work to hide the call's host time."""

import statistics
import time

import torch

from bench.measure import interleave, measure_host

FLUSH = 256 << 20  # bytes, several times any L2
CYCLES = 2e9  # of a multiprocessor in a second, at most: a longer wait than asked for is harmless
ROUNDS = 15


class Queued:
    """A call that has been warmed up, and what it takes: `host` seconds until it returns, `device` until it is done."""

    def __init__(self, call):
        self.call = call
        call()
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        self.host = time.perf_counter() - start
        torch.cuda.synchronize()
        self.device = time.perf_counter() - start

    def __call__(self):
        return self.call()


class DeviceClock:
    """clock(call, repeats): median seconds on the device. Between two calls the L2 is filled with lines of another
    buffer that were only read, so that no call finds its inputs there or pays for writing somebody else's lines."""

    def __init__(self):
        self.buffer = torch.ones(FLUSH // 4, device="cuda")
        self.sink = torch.empty((), device="cuda")

    def __call__(self, call, repeats):
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for start, stop in events:
            torch.sum(self.buffer, dim=0, out=self.sink)
            torch.cuda._sleep(int((1.5 * call.host + 20e-6) * CYCLES))
            start.record()
            call()
            stop.record()
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(stop) for start, stop in events) / 1e3


def measure_device(calls, budget, clock):
    """{name: seconds}, the median of rounds in random order. A GPU under its power limit slows down, so that the
    smallest figure is not the truest."""
    queued = {name: Queued(call) for name, call in calls.items()}
    # A call, its flush and its wait.
    lasts = {name: max(q.device, q.host) + 1.5 * q.host + 200e-6 for name, q in queued.items()}
    share = budget / ROUNDS / len(queued)
    repeats = {name: max(1, min(20, int(share / seconds))) for name, seconds in lasts.items()}
    seconds = interleave(queued, ROUNDS, repeats, clock)
    return {name: statistics.median(values) for name, values in seconds.items()}


def queue_clock(call, repeats):
    """Seconds of the host for one call, from an idle device on: fewer calls than its queue holds."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def measure_queueing(calls, budget):
    return measure_host(calls, budget, repeats=200, clock=queue_clock)
