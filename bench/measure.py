"""Timing several systems fairly: in one process, in random order in every round."""

import gc
import math
import random
import time
from contextlib import contextmanager

SHORTEST = 0.02  # seconds; a faster call is repeated within one measurement


def wall_clock(call, repeats):
    """Seconds of one call, from `repeats` in a row."""
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


@contextmanager
def no_garbage_collection():
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def interleave(calls, rounds, repeats, clock=wall_clock, seed=0):
    """{name: seconds of each round}."""
    rng, names = random.Random(seed), list(calls)
    seconds = {name: [] for name in names}
    with no_garbage_collection():
        for _ in range(rounds):
            rng.shuffle(names)
            for name in names:
                seconds[name].append(clock(calls[name], repeats[name]))
    return seconds


def first_calls(calls):
    """({name: seconds}, {name: what it returned}) of one call each, which warms them up."""
    seconds, results = {}, {}
    for name, call in calls.items():
        start = time.perf_counter()
        results[name] = call()
        seconds[name] = time.perf_counter() - start
    return seconds, results


def measure(calls, once, budget, most=25, clock=wall_clock, pick=min):
    """{name: seconds of a call} from as many rounds as `budget` seconds hold, at least one. `once` is of first_calls.

    `pick` reduces the rounds to one figure. On a CPU what disturbs a call only ever adds time, so the smallest is
    closest to the truth, and a first call can count; a GPU slows down under its power limit, so there the median is.
    """
    repeats = {name: max(1, math.ceil(SHORTEST / seconds)) for name, seconds in once.items()}
    round_time = sum(once[name] * repeats[name] for name in calls)
    rounds = min(most, max(1, int(budget / round_time)))
    seconds = interleave(calls, rounds, repeats, clock)
    return {name: pick(values + [once[name]] * (pick is min)) for name, values in seconds.items()}


def measure_host(calls, budget, repeats=500, clock=wall_clock):
    """{name: seconds} of calls that take microseconds, less what an empty lambda takes."""
    calls = {"": lambda: None, **calls}
    once = {name: clock(call, repeats) for name, call in calls.items()}
    rounds = max(20, int(budget / (repeats * sum(once.values()))))
    seconds = interleave(calls, rounds, dict.fromkeys(calls, repeats), clock)
    best = {name: min(values) for name, values in seconds.items()}
    empty = best.pop("")
    return {name: value - empty for name, value in best.items()}
