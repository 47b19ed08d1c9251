"""Builds of Strobe beside each other on one GPU, for changes of a few percent:

    python -m bench.builds FOLDER FOLDER ... [--suite fwd] [--case "full S=16384"] [--rounds 7] [--turn 0.1]

A build is a folder that `pip install --target FOLDER .` filled. Each has a process of its own, since a process loads
one strobe; they take turns, in random order in every round. Where the GPU's power binds, a turn should be longer than
the clock takes to follow (0.25 s). Two folders with the same build show what a difference means: up to 1 %.
"""

import argparse
import functools
import math
import statistics
import sys
from pathlib import Path

import torch

from bench import gpu
from bench.gpu_worker import Died, Worker, answer
from bench.measure import interleave, wall_clock

SAME = 1e-3  # of the sum of a result's magnitudes, by which builds may differ


def device_clock(call, repeats):
    """Seconds of one call, from `repeats` in a row; the L2 is not emptied between them."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3 / repeats


def serve(folder, device, connection):
    """A build's process. It answers ("prepare", task) with (seconds, magnitudes), ("time", repeats) with seconds."""
    folder = str(Path(folder).resolve())
    sys.path.insert(0, folder)  # before anything here imports strobe
    import strobe
    from bench.gpu_inputs import make_inputs
    from bench.gpu_peers import SYSTEMS

    clock, call = device_clock if device == "cuda" else wall_clock, None

    def handle(name, argument):
        nonlocal call
        if name == "time":
            return clock(call, argument)
        if not Path(strobe.__file__).is_relative_to(folder):
            raise FileNotFoundError(f"{folder} holds no strobe")
        prepared = SYSTEMS["strobe"](argument, make_inputs(argument, device))
        call = prepared.call
        sums = [result.double().abs().sum().item() for result in prepared.results(call())]
        return min(clock(call, 1) for _ in range(3)), sums

    answer(connection, handle)


def agree(ours, theirs):
    return len(ours) == len(theirs) and all(math.isclose(a, b, rel_tol=SAME) for a, b in zip(ours, theirs, strict=True))


def compare(workers, task, rounds, turn):
    """(seconds of each build's call, the median of its turns; which builds have other results than the first)."""
    prepared = [worker.ask("prepare", task) for worker in workers]
    repeats = dict.fromkeys(range(len(workers)), max(1, math.ceil(turn / prepared[0][0])))
    seconds = interleave(dict(enumerate(workers)), rounds, repeats, lambda worker, n: worker.ask("time", n))
    others = [n for n, (_, sums) in enumerate(prepared) if not agree(sums, prepared[0][1])]
    return [statistics.median(seconds[n]) for n in range(len(workers))], others


def main(arguments=None, device="cuda", suites=None):
    suites = suites or gpu.suites(quick=False)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", metavar="FOLDER")
    parser.add_argument("--suite", default="fwd", choices=[name for name in suites if name not in ("host", "jit")])
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--turn", type=float, default=0.1, help="seconds of a build's turn")
    args = parser.parse_args(arguments)
    workers = [Worker(target=functools.partial(serve, folder, device)) for folder in args.folders]
    width = max(len(task.name) for task in suites[args.suite])
    print(f"{'case':{width}}  {'us':>9}  speed beside {args.folders[0]}: " + ", ".join(args.folders[1:]))
    failed = 0
    try:
        for task in suites[args.suite]:
            if args.case not in task.name:
                continue
            try:
                seconds, others = compare(workers, task, args.rounds, args.turn)
            except (Died, RuntimeError) as error:
                failed += 1
                print(f"{task.name:{width}}  {error}", flush=True)
                continue
            failed += bool(others)
            ratios = [f"{seconds[0] / s:.3f}" + " OTHER RESULTS" * (n in others) for n, s in enumerate(seconds)][1:]
            print(f"{task.name:{width}}  {seconds[0] * 1e6:9.1f}  " + "  ".join(ratios), flush=True)
    finally:
        for worker in workers:
            worker.stop(patience=20)
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
