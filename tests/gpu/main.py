"""Proves strobe on this machine's GPUs and writes tests/gpu/receipt.json: python3 tests/gpu/main.py.

Needs torch 2.10 or later with CUDA and numpy; no network, no pytest.
"""

import argparse
import dataclasses
import os
import re
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(ROOT / "tests" / "py"), str(ROOT / "scripts")]

ENGINES = ("sm80", "sm90")
BUDGET_SECONDS = 9 * 60


def missing():
    """What this machine lacks, in words; the first thing only."""
    try:
        import numpy  # noqa: F401
        import torch
    except ImportError as error:
        return f"{error.name}: {sys.executable} has none"
    if tuple(int(n) for n in torch.__version__.split(".")[:2]) < (2, 10):
        return f"torch 2.10 or newer: {sys.executable} has {torch.__version__}"
    if not torch.cuda.is_available():
        return f"a GPU that torch {torch.__version__} can use (torch.cuda.is_available() is False)"
    if torch.cuda.get_device_capability() < (8, 0):
        return f"a GPU of sm_80 or later, and {torch.cuda.get_device_name()} is older"
    return None


def offered_engines(strobe):
    """Engines that take at least a plain call here, and what the others say."""
    import torch

    q = torch.ones(1, 64, 1, 128, dtype=torch.bfloat16, device="cuda")
    offered, others = [], {}
    for engine in ENGINES:
        try:
            strobe.flash_attn_func(q, q, q, backend=engine)
            torch.cuda.synchronize()
            offered.append(engine)
        except (ValueError, NotImplementedError) as error:
            others[engine] = str(error)
    return offered, others


def every_group(engines, fraction):
    """(guarded, plain): the calls by each engine, and what is tested once."""
    import generator
    import scenario

    calls = []
    for group in generator.groups():
        some = group[:: max(1, round(1 / fraction))]
        for engine in engines:
            calls.append([dataclasses.replace(job, backend=engine) for job in some])
    others = scenario.groups()
    guarded = [group for group in others if group[0].guarded] + calls
    return guarded, [group for group in others if not group[0].guarded]


def choose(groups, pattern):
    chosen = [[job for job in group if re.search(pattern, str(job))] for group in groups]
    return [group for group in chosen if group]


class Report:
    def __init__(self):
        self.counts, self.by_engine, self.by_kind = Counter(), {}, {}
        self.passed, self.failures, self.skips, self.refusals, self.slowest = [], [], [], Counter(), []
        self.begin = self.said = time.monotonic()

    def __call__(self, result):
        self.counts[result.status] += 1
        job = result.job
        self.by_kind.setdefault(job.kind, Counter())[result.status] += 1
        if job.backend:
            self.by_engine.setdefault(job.backend, Counter())[result.status] += 1
        if result.status == "passed" and job.kind == "scenario":
            self.passed.append(str(job))
        elif result.status == "failed":
            self.failures.append(result)
            print(f"FAILED {job}\n    {result.text}", flush=True)
        elif result.status == "skipped":
            self.skips.append(f"{job}: {result.text}")
        elif result.status == "refused":
            self.refusals[re.sub(r"\d+", "N", result.text)] += 1
        self.slowest = sorted([*self.slowest, result], key=lambda r: -r.seconds)[:5]
        if time.monotonic() - self.said > 20:
            self.said = time.monotonic()
            print(f"{self.said - self.begin:.0f} s: {dict(self.counts)}", flush=True)


def parse():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="jobs whose name matches this pattern; writes no receipt")
    parser.add_argument("--fraction", type=float, default=1.0, help="of each group; below 1 writes no receipt")
    parser.add_argument("--workers", type=int, default=0, help="processes; default: as gpu_workers.py says")
    parser.add_argument("--no-sanitizer", action="store_true", help="leave compute-sanitizer out; writes no receipt")
    parser.add_argument("--site", type=Path, help="a strobe of whatever sources; writes no receipt")
    parser.add_argument("--seconds", type=float, default=BUDGET_SECONDS, help="what is not done by then has failed")
    parser.add_argument("--receipt", type=Path, help="where it goes; with --only, what receipt.py merge takes")
    return parser.parse_args()


def main():
    options = parse()
    lacks = missing()
    if lacks:
        print(f"make test-gpu needs {lacks}", file=sys.stderr)
        return 2
    begin = time.monotonic()
    import installed

    site = str(options.site.resolve()) if options.site else installed.find_or_build(ROOT)
    sys.path.insert(0, site)
    # Every kernel is compiled, and by these sources: nothing comes from an earlier run.
    cache = tempfile.TemporaryDirectory(prefix="strobe-test-gpu-")
    os.environ["STROBE_CACHE_DIR"] = cache.name
    os.environ.pop("STROBE_BACKEND", None)
    import fronts

    drop_ins = tempfile.TemporaryDirectory(prefix="strobe-drop-ins-")
    sys.path.insert(0, fronts.install_drop_ins(Path(drop_ins.name)))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [drop_ins.name, site, os.environ.get("PYTHONPATH")]))

    import gpu_workers
    import pool
    import receipt
    import sanitizer

    import strobe

    unknown = options.fraction != 1.0 or options.site
    partial = options.only or options.no_sanitizer or unknown
    engines, not_offered = offered_engines(strobe)
    guarded, plain = every_group(engines, options.fraction)
    guarded, plain = choose(guarded, options.only), choose(plain, options.only)
    jobs = sum(map(len, guarded + plain))
    print(f"{jobs} jobs, engines {engines}, strobe of {installed.described(site, ROOT)}", flush=True)
    tools = None if options.no_sanitizer else sanitizer.Runs(engines)
    report = Report()
    workers = options.workers or gpu_workers.default_workers()
    left = pool.run(guarded, plain, workers, report, begin + options.seconds)
    findings = tools.finish(max(30.0, begin + options.seconds - time.monotonic())) if tools else None

    seconds = time.monotonic() - begin
    report.counts["failed"] += len(left)
    for job in left[:20]:
        print(f"FAILED {job}\n    not run within {options.seconds:.0f} s", flush=True)
    result = dict(
        counts={status: report.counts[status] for status in ("passed", "failed", "skipped", "refused")},
        kinds={kind: dict(counts) for kind, counts in sorted(report.by_kind.items())},
        engines={e: dict(c) for e, c in sorted(report.by_engine.items())} | not_offered,
        skipped=sorted(report.skips),
        refused=dict(report.refusals),
        not_run=len(left),
        sanitizer=findings,
        kernels=len(list(Path(cache.name).glob("*.cubin"))),
        seconds=round(seconds, 1),
    )
    print("slowest: " + ", ".join(f"{r.job} {r.seconds:.0f} s" for r in report.slowest))
    for failure in report.failures[:40]:
        print(f"FAILED {failure.job}: {failure.text[:200]}")
    print({key: value for key, value in result.items() if key not in ("skipped", "refused")})
    ok = report.counts["failed"] == 0 and sanitizer.clean(findings) and report.counts["passed"] > 0
    if not partial:
        receipt.write(options.receipt or HERE / "receipt.json", result)
    elif options.receipt and not unknown:
        receipt.write_part(options.receipt, sorted(report.passed), report.counts["failed"], result["seconds"])
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
