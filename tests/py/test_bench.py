"""The benchmark's own arithmetic: what it counts, what it refuses, what it writes and how it judges."""

import json
import math
import pathlib
import sys
from dataclasses import replace

import pytest
import torch

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from bench import builds, cases, cpu, gpu, gpu_page, gpu_peers, gpu_run, marks, page, plot, report
from bench.gpu_inputs import make_inputs
from bench.gpu_reference import part_of, parts_of
from bench.gpu_reference import reference as float64
from bench.gpu_worker import Worker
from bench.main import join

import reference
import strobe
from cases import Case
from dying_worker import dying

TINY = Case((40, 40), None, "bf16", 16, 24, 4, 2, causal=True)
MASKS = [
    dict(),
    dict(causal=True),
    dict(causal=True, window=(5, 0)),
    dict(causal=True, window=(5, 0), keep_first=3),
    dict(window=(4, 2)),
    dict(window=(-1, 3), keep_first=50),
    dict(causal=True, window=(0, 0), keep_first=1),
]
LENGTHS = [(33, 33), (1, 40), (8, 40), (40, 8), (1, 1)]


def mask_of(case, b=0):
    return reference.visible(case.seqlens_q[b], case.seqlens_k[b], case.causal, case.window, case.keep_first)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_visible_pairs_are_the_oracles(mask, lengths):
    case = Case((lengths[0],), (lengths[1],), **mask)
    assert cases.visible_pairs(case) == mask_of(case).sum()
    assert torch.equal(cases.dense_mask(case), mask_of(case))


def test_pairs_of_packed_sequences_add_up():
    case = Case((5, 33, 1), (5, 33, 1), causal=True, window=(7, 0), keep_first=2, layout="packed")
    assert cases.visible_pairs(case) == sum(mask_of(case, b).sum() for b in range(3))


def test_units():
    task = cases.Task("fwd", "forward", TINY, "TFLOP/s")
    operations = 2 * 2 * (40 * 41 // 2) * (16 + 24) * 4
    assert cases.in_unit(task, 0.5) == pytest.approx(operations / 0.5 / 1e12)
    backward = replace(task, kind="backward", unit="GFLOP/s")
    assert cases.in_unit(backward, 0.5) == pytest.approx(operations / 40 * (3 * 16 + 2 * 24) / 0.5 / 1e9)
    decode = cases.Task("decode", "decode", replace(TINY, seqlens_q=(1, 1)), "TB/s")
    assert cases.in_unit(decode, 2.0) == pytest.approx(2 * 40 * 2 * (16 + 24) * 2 / 2.0 / 1e12)
    assert cases.in_unit(replace(task, unit="us"), 0.25) == 250_000


@pytest.mark.parametrize("machine", [cpu, gpu], ids=["cpu", "gpu"])
@pytest.mark.parametrize("quick", [False, True], ids=["full", "quick"])
def test_tasks_have_names_of_their_own(machine, quick):
    for suite, tasks in machine.suites(quick).items():
        names = [task.name for task in tasks]
        assert names and len(set(names)) == len(names), suite
        assert {task.suite for task in tasks} == {suite}


def made_up_rows(machine, figure):
    """A complete run in which `figure(task, system)` was measured."""
    tasks = sum(machine.suites(quick=False).values(), [])
    return {task: report.make_row(task, {name: figure(task, name) for name in machine.SYSTEMS}) for task in tasks}


def judged(machine, measured):
    tasks = sum(machine.suites(quick=False).values(), [])
    return {text: (figure, verdict) for text, _, figure, verdict in marks.judge(machine.marks(), measured, tasks)}


@pytest.mark.parametrize("machine", [cpu, gpu], ids=["cpu", "gpu"])
def test_every_mark_reads_a_complete_run(machine):
    """Four times as good as every peer, and times that no limit forbids; ratios of two own rows are 1."""

    def figure(task, name):
        rate = task.unit.endswith("/s")
        ours = name.startswith("strobe")
        return {True: {True: 16.0, False: 4.0}, False: {True: 0.05, False: 0.2}}[rate][ours]

    found = judged(machine, made_up_rows(machine, figure))
    assert len(found) == len(machine.marks())
    for text, (value, verdict) in found.items():
        assert verdict in ("reached", "NOT reached"), text
        if machine is gpu and "host" in text:
            assert value == pytest.approx(0.25), text
        elif machine is gpu and ("time" in text or "rate / dense" in text):
            assert value == pytest.approx(1.0), text
        elif machine is gpu and "/" in text and "TB/s" not in text:
            assert value == pytest.approx(4.0), text
    if machine is gpu:
        assert all(verdict == "reached" for _, verdict in found.values())


def test_marks_take_the_worst_row_and_the_mean():
    measured = made_up_rows(gpu, lambda task, name: 2.0)
    slow = next(task for task in measured if task.suite == "fwd" and task.case.head_dim == 128)
    measured[slow]["engines"]["strobe-sm80"] = 1.0
    found = judged(gpu, measured)
    rows = 18  # three head dims, three lengths, two masks
    assert found["sm80 forward d 64, 128, 256 / fa2"][0] == pytest.approx(0.5 ** (1 / rows))
    assert found["sm80 forward d 64, 128, 256 / fa2, worst row"] == (0.5, "NOT reached")


def test_the_best_peer_is_the_fastest_in_either_unit():
    def row(unit, **peers):
        return dict(case="", unit=unit, strobe=3.0, peers=peers)

    assert marks.speedup(row("TB/s", fa2=1.0, fa3=2.0)) == 1.5
    assert marks.speedup(row("us", fa2=6.0, fa3=9.0)) == 2.0


def test_a_failed_figure_is_shown_and_reaches_no_mark():
    measured = made_up_rows(gpu, lambda task, name: 2.0)
    task = next(task for task in measured if task.suite == "fwd")
    measured[task] = report.make_row(task, {"strobe": 1.0, "strobe-sm80": "ValueError: no", "fa2": 2.0})
    assert measured[task]["failed"] == {"strobe-sm80": "ValueError: no"}
    assert "strobe-sm80 failed: ValueError: no" in report.line(measured[task], gpu.SYSTEMS)
    figure, verdict = judged(gpu, measured)["sm80 forward d 64, 128, 256 / fa2"]
    assert figure is None and verdict.startswith("NOT measured: strobe-sm80 failed")
    document = dict(device="a GPU", versions={}, ceiling={"copy TB/s": 4.0}, rows=list(measured.values()))
    assert "| ValueError: no |" in gpu.tables(document, [])


def test_results_come_back_from_their_file(tmp_path):
    measured = made_up_rows(gpu, lambda task, name: 1.0 if name != "flex" else "RuntimeError: failed | here")
    document = dict(device="a GPU", versions={"torch": "2"}, ceiling={"copy TB/s": 4.12345})
    halves = []
    first = ("fwd", "host")
    for suites in (first, tuple(name for name in gpu.suites(quick=False) if name not in first)):
        halves.append(tmp_path / f"{suites[0]}.json")
        rows = [row for row in measured.values() if row["suite"] in suites]
        written = report.write_json(halves[-1], document | dict(rows=rows))
        assert written == json.loads(halves[-1].read_text())
    joined, again = join(halves, gpu)
    assert again == measured
    assert list(joined) == ["device", "versions", "ceiling", "rows"] and joined["ceiling"] == {"copy TB/s": 4.123}
    for row in joined["rows"]:
        assert {"suite", "case", "params", "unit", "strobe", "peers"} <= set(row)
    other = tmp_path / "other.json"
    report.write_json(other, document | dict(device="another GPU", rows=[]))
    with pytest.raises(SystemExit, match="another device"):
        join([halves[0], other], gpu)


def test_a_peer_that_only_some_runs_had_is_missing_in_the_others(tmp_path):
    old, new, odd = (tmp_path / f"{name}.json" for name in ("old", "new", "odd"))
    rows = list(made_up_rows(gpu, lambda task, name: 1.0).values())
    document = dict(device="a GPU", ceiling={})
    report.write_json(old, document | dict(versions={"torch": "2"}, rows=rows))
    fresh = [row for row in rows if row["suite"] == "fwd"]
    report.write_json(new, document | dict(versions={"torch": "2", "fa4": "4.0"}, rows=fresh))
    report.write_json(odd, document | dict(versions={"torch": "3"}, rows=[]))
    joined, _ = join([old, new], gpu)
    others = sorted({row["suite"] for row in rows} - {"fwd"})
    assert joined["versions"] == {"torch": "2", "fa4": "4.0"} and joined["without"] == {"fa4": others}
    assert f"fa4 in {', '.join(others)}." in gpu.tables(joined, [])
    report.write_json(old, joined)
    assert join([old, new], gpu)[0]["without"] == joined["without"] and "without" not in join([new], gpu)[0]
    with pytest.raises(SystemExit, match="other versions: torch 3, not 2"):
        join([old, odd], gpu)


def test_a_suite_that_was_measured_again_counts_and_says_of_which_sources(tmp_path):
    old, new, part = (tmp_path / f"{name}.json" for name in ("old", "new", "part"))
    document = dict(device="a GPU", versions={}, ceiling={})
    for path, sources, figure in ((old, "a" * 64, 1.0), (new, "b" * 64, 2.0), (part, "c" * 64, 3.0)):
        rows = list(made_up_rows(gpu, lambda task, name, figure=figure: figure).values())
        rows = [row for row in rows if path == old or row["suite"] == "fwd"]
        report.write_json(path, document | dict(sources=sources, rows=rows[:1] if path == part else rows))
    joined, measured = join([old, new], gpu)
    assert {row["strobe"] for task, row in measured.items() if task.suite == "fwd"} == {2.0}
    assert {row["strobe"] for task, row in measured.items() if task.suite != "fwd"} == {1.0}
    assert joined["sources"]["fwd"] == "b" * 64 and joined["sources"]["bwd"] == "a" * 64
    assert "fwd: bbbbbbbbbbbb" in gpu.tables(joined, [])
    report.write_json(old, joined)
    assert join([old, new], gpu)[0]["sources"] == joined["sources"]
    assert join([new], gpu)[0]["sources"] == "b" * 64 and "Not all" not in gpu.tables(join([new], gpu)[0], [])
    with pytest.raises(SystemExit, match="other sources: c*, and not all of suite fwd"):
        join([new, part], gpu)


def test_only_rows_with_a_peer_are_drawn(tmp_path):
    path = tmp_path / "results.json"
    rows = [row for row in made_up_rows(gpu, lambda task, name: 1.0).values() if row["suite"] == "host"]
    alone = [row | dict(peers={}) for row in rows]
    for given, drawn in ((alone, None), (rows, path.with_suffix(".svg"))):
        report.write_json(path, dict(device="a GPU", versions={}, ceiling={}, rows=given))
        assert plot.plot(path) == drawn and path.with_suffix(".svg").exists() == (drawn is not None)


def test_results_are_named_after_the_device():
    assert gpu.name("NVIDIA H200, 132 SMs, 140 GiB, driver 1.2") == "nvidia-h200"
    root = pathlib.Path(__file__).parents[2]
    for name in ("cpu", "nvidia-h200"):
        assert f"<!-- {name}: end -->" in (root / "docs" / "performance.md").read_text()


def test_the_page_keeps_what_is_around_its_tables(tmp_path):
    path = tmp_path / "page.md"
    path.write_text("before\n<!-- gpu: written by the benchmark -->\nold\n<!-- gpu: end -->\nafter\n")
    rows = list(made_up_rows(gpu, lambda task, name: 2.0 if name == "fa2" else 1.0).values())
    text = gpu_page.tables(dict(device="a GPU", versions={}, ceiling={}, rows=rows), [])
    assert page.update(path, "gpu", text) and page.update(path, "gpu", text)
    assert not page.update(path, "another", "lost")
    lines = path.read_text().splitlines()
    assert lines[0] == "before" and lines[-1] == "after" and not {"old", "lost"} & {*lines}
    assert "| fwd | 0 of 54 | 0.50x | 0.50x | 0.50x |" in lines


@pytest.mark.parametrize("kind", ["forward", "backward"])
@pytest.mark.parametrize("layout", ["dense", "packed"])
def test_float64_reference_is_the_oracle(kind, layout):
    case = replace(TINY, seqlens_q=(40, 40), layout=layout, window=(9, 0), keep_first=2)
    task = cases.Task("fwd", kind, case, "TFLOP/s")
    inputs = make_inputs(task, "cpu")
    q, k, v = leaves = [x.double().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    rows = [torch.arange(b * 40, b * 40 + 40) for b in range(2)]
    problem = reference.Problem(rows, rows, 16**-0.5, True, case.window, case.keep_first)
    out, _ = reference.attention(problem, q, k, v)
    results = (out,) if kind == "forward" else torch.autograd.grad(out, leaves, inputs.dout.double())
    for part in parts_of(task):
        for actual, expected in zip(float64(task, inputs, part), part_of(task, inputs, part, results), strict=True):
            torch.testing.assert_close(actual, expected)


RUNS = [
    cases.Task("fwd", "forward", TINY, "TFLOP/s"),
    cases.Task("bwd", "backward", TINY, "TFLOP/s"),
    cases.Task("window", "backward", replace(TINY, window=(9, 0), keep_first=2), "TFLOP/s"),
    cases.Task("varlen", "backward", replace(TINY, seqlens_q=(9, 40, 2), seqlens_k=None, layout="packed"), "TFLOP/s"),
    cases.Task("decode", "decode", Case((1,) * 3, (40,) * 3, "bf16", 16, heads=4, heads_k=2, causal=True), "us"),
    cases.Task(
        "decode", "decode",
        Case((1,) * 3, (40,) * 3, "bf16", 16, heads=4, heads_k=2, causal=True, layout="paged", page_size=8), "TB/s",
    ),
    cases.Task(
        "pages", "decode",
        Case((40,) * 3, (40,) * 3, "bf16", 16, heads=4, heads_k=2, causal=True, layout="paged", page_size=8), "TFLOP/s",
    ),
    cases.Task("append", "append", Case((5,) * 2, (40,) * 2, "bf16", 16, heads=4, causal=True), "us"),
    cases.Task(
        "append", "append",
        Case((5,) * 2, (40,) * 2, "bf16", 16, heads=4, causal=True, layout="paged", page_size=8), "us",
    ),
    cases.Task("host", "host", Case((1,), None, "bf16", 16, heads=1), "us"),
    cases.Task("host", "host_grad", Case((1,), None, "bf16", 16, heads=1), "us"),
]  # fmt: skip


def made_up_seconds(task, calls, budget):
    return dict.fromkeys(calls, 1e-3)


@pytest.mark.parametrize("task", RUNS, ids=lambda task: f"{task.suite} {task.name}")
def test_systems_agree_with_float64(task):
    """The GPU benchmark's systems that also run on CPU tensors pass its check, whatever the task."""
    systems = {name: gpu_peers.SYSTEMS[name] for name in ("strobe", "strobe-plain", "sdpa")}
    if task.kind in ("forward", "backward") and task.case.layout == "dense" and task.case.window == (-1, -1):
        systems["fa2"] = gpu_peers.SYSTEMS["fa2"]
    values = gpu_run.run_task(task, 0.0, systems, {}, "cpu", made_up_seconds)
    assert values["strobe"] == pytest.approx(cases.in_unit(task, 1e-3))
    assert all(not isinstance(value, str) for value in values.values()), values
    assert ("strobe-plain" in values) == (task.suite == "pages")
    assert ("fa2" in values) == ("fa2" in systems)


def spoilt(change):
    def system(task, inputs):
        prepared = gpu_peers.SYSTEMS["strobe"](task, inputs)
        results = prepared.results
        prepared.results = lambda returned: change(*results(returned))
        return prepared

    return system


def raising(task, inputs):
    raise NotImplementedError("not for this one")


@pytest.mark.parametrize("task", RUNS[:2], ids=lambda task: task.suite)
def test_wrong_results_are_not_timed(task):
    systems = {
        "strobe": gpu_peers.SYSTEMS["strobe"],
        "off": spoilt(lambda first, *others: (first * 1.1, *others)),
        "nan": spoilt(lambda first, *others: (first.clone().index_fill_(1, torch.tensor([3]), math.nan), *others)),
        "short": spoilt(lambda first, *others: (first[:, :-1], *others)),
        "raises": raising,
        "cannot": lambda task, inputs: None,
    }
    values = gpu_run.run_task(task, 0.0, systems, {"hung": "no answer"}, "cpu", made_up_seconds)
    assert list(values) == ["strobe", "off", "nan", "short", "raises"]
    assert isinstance(values["strobe"], float)
    assert "differs from float64" in values["off"] and "differs from float64" in values["nan"]
    assert "has shape" in values["short"]
    assert values["raises"] == "NotImplementedError: not for this one"


def test_a_process_that_dies_or_hangs_costs_one_figure():
    worker = Worker(silence=3, target=dying)
    try:
        values = worker.run(None, 0.0, ["a", "b", "c", "d", "e"])
    finally:
        worker.stop()
    assert values == {
        "a": 1.0,
        "b": "the process ended with status 3",
        "c": "no answer within 3 s",
        "d": "illegal address",
        "e": 1.0,
    }


@pytest.fixture
def another_build(tmp_path):
    """A folder whose strobe gives other results than ours."""
    package = tmp_path / "other" / "strobe"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("def flash_attn_func(q, k, v, **options):\n    return 2 * q\n")
    return str(package.parent)


def test_builds_take_turns(another_build, capfd):
    """Each build has its process and its strobe; what computes something else is named."""
    tiny = cases.Task("fwd", "forward", Case((40,), None, "fp32", 16), "TFLOP/s")
    ours = str(pathlib.Path(strobe.__file__).parents[1])
    options = ["--rounds", "2", "--turn", "0.001"]
    assert builds.main([ours, ours, *options], "cpu", {"fwd": [tiny]}) == 0
    (line,) = [line for line in capfd.readouterr().out.splitlines() if line.startswith(tiny.name)]
    micros, ratio = line.removeprefix(tiny.name).split()
    assert float(micros) > 0 and float(ratio) > 0
    assert builds.main([ours, another_build, *options], "cpu", {"fwd": [tiny]}) == 1
    assert "OTHER RESULTS" in capfd.readouterr().out


def test_a_folder_without_a_build_is_named(tmp_path, capfd):
    tiny = cases.Task("fwd", "forward", Case((4,), None, "fp32", 16), "TFLOP/s")
    assert builds.main([str(tmp_path)], "cpu", {"fwd": [tiny]}) == 1
    assert f"{tmp_path} holds no strobe" in capfd.readouterr().out
