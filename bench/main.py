"""Runs suites of the benchmark: python -m bench.main [--machine cpu] [--suite fwd,host] [--quick] [--out FILE].

A machine is a module of this package with
    name(device)    of its result files and of its part of docs/performance.md
    SYSTEMS         names of what is timed, "strobe" first
    suites(quick)   {suite: tasks}
    marks()         what a full run is held to
    device()        its name
    versions()      {package: version} besides those of every machine
    sources()       the digest of what was measured, None if there is none
    notes()         what to know before reading the figures
    ceiling()       {what: the best that it does, measured now}
    run(task, s)    {system: figure in the task's unit or why it has none}, from about s seconds of rounds
    tables(d, v)    the page's part, from the document and the marks' verdicts
    close()         ends what it started
"""

import argparse
import importlib
import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from bench import page, report
from bench.marks import judge

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
MACHINES = ("cpu", "gpu")
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
    parser.add_argument("--case", help="only cases whose name contains this")
    parser.add_argument("--systems", help="some of the systems, with commas between them; all if not given")
    parser.add_argument("--quick", action="store_true", help="smaller problems and fewer rounds")
    parser.add_argument("--out", type=Path, help="JSON, with a plot beside it; a full run has a place for it")
    parser.add_argument("--join", type=Path, nargs="+", metavar="JSON", help="measure nothing, join results of runs")
    args = parser.parse_args()
    machine = importlib.import_module(f"bench.{args.machine}")
    suites = machine.suites(args.quick)
    names = args.suite.split(",") if args.suite else list(suites)
    unknown = [name for name in names if name not in suites]
    if unknown:
        parser.error(f"no suite is called {unknown[0]}; there are {', '.join(suites)}")
    if args.systems:
        wanted = args.systems.split(",")
        if unknown := [name for name in wanted if name not in machine.SYSTEMS]:
            parser.error(f"no system is called {unknown[0]}; there are {', '.join(machine.SYSTEMS)}")
        machine.choose(wanted)
    chosen = {name: [task for task in suites[name] if (args.case or "") in task.name] for name in names}
    args.full = not (args.quick or args.case or args.systems) and names == list(suites)
    return args, machine, chosen


def load():
    """How many processes want a CPU now: a figure taken on a busy machine is worth little."""
    return f"load average {os.getloadavg()[0]:.1f}"


def measure(args, machine, suites):
    """(the document, {task: row})."""
    device, ceiling = machine.device(), machine.ceiling()
    print("\n".join([f"{device}; {load()}", *machine.notes()]))
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
    document = dict(device=device, versions=versions() | machine.versions(), sources=machine.sources())
    document = {name: value for name, value in document.items() if value is not None}
    return document | dict(ceiling=ceiling, rows=list(measured.values())), measured


def versions_of(paths, documents):
    """All versions that the runs name, and by name the suites whose last run had none of it."""
    versions, beside = {}, {}  # beside: what a suite was measured with
    for path, document in zip(paths, documents, strict=True):
        for name, this in document["versions"].items():
            if versions.setdefault(name, this) != this:
                raise SystemExit(f"{path} has other versions: {name} {this}, not {versions[name]}")
        lacked = document.get("without", {})
        for suite in {row["suite"] for row in document["rows"]}:
            beside[suite] = {name for name in document["versions"] if suite not in lacked.get(name, ())}
    without = {name: sorted(suite for suite in beside if name not in beside[suite]) for name in versions}
    return versions, {name: suites for name, suites in without.items() if suites}


def join(paths, machine):
    """(one document, {task: row}) of runs on the same device beside the same versions; what a later file has counts.

    "sources" is then by suite, if they differ, and "without" names the suites that lacked a peer that others had.
    """
    documents = [json.loads(path.read_text()) for path in paths]
    first, rows, origins = documents[0], {}, {}  # rows: by (suite, case); origins: a suite's sources
    for path, document in zip(paths, documents, strict=True):
        if document["device"] != first["device"]:
            raise SystemExit(f"{path} has another device: {document['device']}, not {first['device']}")
        new, theirs = document.get("sources"), {(row["suite"], row["case"]): row for row in document["rows"]}
        given = {suite: new[suite] if isinstance(new, dict) else new for suite, _ in theirs}
        kept = [key for key in rows.keys() - theirs.keys() if given.get(key[0], origins[key[0]]) != origins[key[0]]]
        if kept:
            raise SystemExit(f"{path} has other sources: {given[kept[0][0]]}, and not all of suite {kept[0][0]}")
        origins |= given
        rows |= theirs
    versions, without = versions_of(paths, documents)
    sources = next(iter(origins.values()), None) if len(set(origins.values())) < 2 else origins
    ceiling = {name: max(d["ceiling"][name] for d in documents) for name in first["ceiling"]}
    tasks = sum(machine.suites(quick=False).values(), [])
    measured = {task: rows[task.suite, task.name] for task in tasks if (task.suite, task.name) in rows}
    document = {name: value for name, value in first.items() if name not in ("sources", "without")}
    document |= dict(versions=versions, ceiling=ceiling, rows=list(rows.values()))
    return document | {name: value for name, value in dict(sources=sources, without=without).items() if value}, measured


def main():
    args, machine, suites = parse()
    try:
        document, measured = join(args.join, machine) if args.join else measure(args, machine, suites)
    finally:
        machine.close()
    verdicts = judge(machine.marks(), measured, sum(machine.suites(quick=False).values(), []))
    print(report.verdict_table(verdicts))
    name = machine.name(document["device"])
    if args.out is None and args.full:
        args.out = RESULTS / f"{name}.json"
    if args.out:
        document = report.write_json(args.out, document)
        save(args, name, machine.tables(document, verdicts))


def save(args, name, tables):
    print(f"\n{args.out} written")
    try:
        from bench.plot import plot
    except ModuleNotFoundError as missing:  # a machine without network may have no matplotlib
        print(f"no plot: {missing}; run python -m bench.plot {args.out} where it is installed")
    else:
        drawn = plot(args.out)
        print(f"{drawn} written" if drawn else "no plot: no row has a peer")
    if args.full:
        print(f"{PAGE} has the tables" if page.update(PAGE, name, tables) else f"{PAGE} has no place for {name}")


if __name__ == "__main__":
    main()
