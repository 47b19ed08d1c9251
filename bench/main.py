"""Runs suites of the benchmark: python -m bench.main [--machine cpu] [--suite fwd,host] [--quick] [--out FILE].

A machine is a module of this package with
    NAME            of its result files and of its part of docs/performance.md
    SYSTEMS         {name: what prepares a task}, "strobe" first
    suites(quick)   {suite: tasks}
    marks()         what a full run is held to
    device()        its name
    ceiling()       {what: the best that it does, measured now}
    run(task, s)    {system: figure in the task's unit}, from about s seconds of rounds
"""

import argparse
import importlib
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from bench import page, report
from bench.marks import judge

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
MACHINES = ("cpu",)
PAGE = ROOT / "docs" / "performance.md"


def versions():
    found = {"python": platform.python_version()}
    for package in ("strobe", "torch"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed as a package"
    return found


def parse():
    parser = argparse.ArgumentParser(description="Times Strobe beside other attention on this machine.")
    parser.add_argument("--machine", default="cpu", choices=MACHINES)
    parser.add_argument("--suite", help="some of the suites, with commas between them; all if not given")
    parser.add_argument("--quick", action="store_true", help="smaller problems, under 2 minutes")
    parser.add_argument("--out", type=Path, help="JSON, with a plot beside it; a full run has a place for it")
    args = parser.parse_args()
    machine = importlib.import_module(f"bench.{args.machine}")
    suites = machine.suites(args.quick)
    names = args.suite.split(",") if args.suite else list(suites)
    unknown = [name for name in names if name not in suites]
    if unknown:
        parser.error(f"no suite is called {unknown[0]}; there are {', '.join(suites)}")
    args.full = not args.quick and names == list(suites)
    if args.out is None and args.full:
        args.out = RESULTS / f"{machine.NAME}.json"
    return args, machine, {name: suites[name] for name in names}


def load():
    """How many processes want a CPU now: a figure taken on a busy machine is worth little."""
    return f"load average {os.getloadavg()[0]:.1f}"


def main():
    args, machine, suites = parse()
    device, ceiling = machine.device(), machine.ceiling()
    print(f"{device}; {load()}")
    measured = {}
    for suite, tasks in suites.items():
        print(report.heading(suite, machine.SYSTEMS))
        for task in tasks:
            measured[task] = report.make_row(task, machine.run(task, 0.5 if args.quick else 2.0))
            print(report.line(measured[task], machine.SYSTEMS), flush=True)
    # What else ran meanwhile may have slowed the first look at the ceiling.
    ceiling = {
        name: max(value, again)
        for (name, value), again in zip(ceiling.items(), machine.ceiling().values(), strict=True)
    }
    print("\nceiling: " + ", ".join(f"{name} {report.number(value)}" for name, value in ceiling.items()))
    print(load())
    verdicts = judge(machine.marks(), measured, sum(machine.suites(quick=False).values(), []))
    print(report.verdict_table(verdicts))
    if args.out:
        save(args, machine, report.write_json(args.out, device, versions(), ceiling, list(measured.values())), verdicts)


def save(args, machine, document, verdicts):
    print(f"\n{args.out} written")
    try:
        from bench.plot import plot
    except ModuleNotFoundError as missing:  # a machine without network may have no matplotlib
        print(f"no plot: {missing}; run python -m bench.plot {args.out} where it is installed")
    else:
        print(f"{plot(args.out)} written")
    if args.full:
        page.update(PAGE, machine.NAME, document, verdicts)
        print(f"{PAGE} has the tables")


if __name__ == "__main__":
    main()
