"""The benchmark of the CUDA engines on one GPU: its grid, its marks, and what the GPU can do at best."""

import random
from dataclasses import replace

from bench.cases import Case, Task
from bench.gpu_page import tables  # noqa: F401  part of what a machine is
from bench.gpu_worker import Worker
from bench.marks import (
    Mark,
    at_least,
    at_most,
    best_figure,
    geomean_speedup,
    geomean_time,
    largest,
    rate_share,
    smallest,
    worst_group,
    worst_speedup,
)

SYSTEMS = ["strobe", "strobe-plain", "strobe-sm80", "sdpa", "fa2", "cudnn", "flex", "fa3", "fa4"]

SAME = ((64, 64), (96, 96), (128, 128), (256, 256), (192, 128))
UNEQUAL = ((32, 64), (64, 128), (96, 192), (128, 256))
HEADS = {32: 32, 64: 32, 96: 16, 128: 16, 192: 16, 256: 8}
TOKENS = 16384
FA2_GRID = ((64, 64), (128, 128), (256, 256))
FA2_PADDED = (*UNEQUAL, (192, 128))


def grid(suite, kind, quick):
    dims = ((64, 64), (128, 128), (64, 128)) if quick else SAME + UNEQUAL
    return [
        Task(suite, kind, Case((s,) * (TOKENS // s), None, "bf16", d, dv, HEADS[d], causal=causal), "TFLOP/s")
        for d, dv in dims
        for causal in (False, True)
        for s in ((4096,) if quick else (1024, 4096, 16384))
    ]


def window(quick):
    s = 4096 if quick else 10000
    base = dict(dtype="bf16", head_dim=128, heads=32, heads_k=4, causal=True)
    cases = [
        Case((s,), None, **base, window=(1000, 0), keep_first=4),
        Case((s,), None, **base, window=(1000, 0)),
        Case((s,), None, **base),
        Case((16384,) * 2, None, "bf16", 64, heads=64, heads_k=8, causal=True, window=(128, 0)),
    ]
    return [
        Task("window", kind, case, "TFLOP/s")
        for kind in ("forward", "backward")
        for case in (cases[:2] if quick else cases)
    ]


def decode(quick):
    base = dict(dtype="bf16", head_dim=128, heads=32, heads_k=8, causal=True)
    pages = dict(layout="paged", page_size=16)

    def task(unit, batch, keys, tokens=1, **changed):
        return Task("decode", "decode", Case((tokens,) * batch, (keys,) * batch, **(base | changed)), unit)

    short = [task("us", 1, 32768), task("TB/s", 64, 8192), task("TB/s", 128, 4096, **pages)]
    if quick:
        return short
    return short + [
        task("us", 16, 131072, window=(2000, 0), keep_first=10),
        task("us", 16, 2010),
        task("us", 1, 131072, heads=64),
        task("us", 1, 131072, tokens=8, heads=64),
    ]


def prompt(quick):
    """One sequence of few heads, as a GPU of several sees it: too few row blocks to fill it."""
    cases = [
        Case((s,), None, "bf16", 128, heads=heads, causal=True)
        for heads in ((2,) if quick else (1, 2, 4, 8))
        for s in (1024, 4096)
    ]
    return [Task("prompt", "forward", case, "TFLOP/s") for case in cases]


def paged_prompt(quick):
    """Prompts whose keys lie in pages."""
    lengths = (4096,) * 4
    cases = [
        Case(lengths, lengths, "bf16", d, dv, HEADS[d], HEADS[d] // 4, causal=causal, layout="paged", page_size=size)
        for d, dv in (((128, 128),) if quick else SAME + UNEQUAL)
        for causal in (False, True)
        for size in (16, 64)
    ]
    return [Task("pages", "decode", case, "TFLOP/s") for case in cases]


def append(quick):
    base = dict(dtype="bf16", head_dim=128, heads=32, heads_k=8, causal=True)
    pages = dict(layout="paged", page_size=16)
    cases = [
        Case((1,) * 64, (8192,) * 64, **base),
        Case((1,) * 64, (8192,) * 64, **base, **pages),
        Case((512,) * 8, (8192,) * 8, **base, **pages),
    ]
    return [Task("append", "append", case, "us") for case in (cases[1:2] if quick else cases)]


def host():
    tiny = Case((1,), None, "bf16", 64, heads=1)
    return [Task("host", "host", tiny, "us"), Task("host", "host_grad", tiny, "us")]


def jit():
    """First calls: of dims in no list of kernels, of common ones, and of those that keep the compiler longest."""
    rare = Case((512,), None, "bf16", 72, 104, heads=4, causal=True)
    common = Case((4096,), None, "bf16", 128, heads=16, causal=True)
    capped = replace(common, softcap=30.0)
    paged = Case((4096,), (4096,), "bf16", 96, 192, 16, 4, causal=True, layout="paged", page_size=16)
    slowest = [replace(capped, head_dim_v=192), paged, replace(paged, window=(1000, 0), keep_first=4)]
    calls = [("forward", rare), ("backward", rare), *(("forward", case) for case in (common, capped, *slowest))]
    return [Task("jit", f"{when}_{what}", case, "s") for when in ("new", "again") for what, case in calls]


def mixed_lengths(quick):
    lengths = [34] * 32 + [500] * 6 + [2048] * 2 + [8192]  # 16376 tokens
    random.Random(0).shuffle(lengths)
    return tuple(lengths[:8] if quick else lengths)


def varlen(quick):
    lengths = mixed_lengths(quick)
    cases = [Case(lengths, None, "bf16", 128, heads=16, causal=causal, layout="packed") for causal in (False, True)]
    return [Task("varlen", kind, case, "TFLOP/s") for kind in ("forward", "backward") for case in cases]


def suites(quick):
    return {
        "fwd": grid("fwd", "forward", quick),
        "bwd": grid("bwd", "backward", quick),
        "window": window(quick),
        "decode": decode(quick),
        "append": append(quick),
        "host": host(),
        "jit": jit(),
        "varlen": varlen(quick),
        "prompt": prompt(quick),
        "pages": paged_prompt(quick),
    }


def chosen(suite, dims=None, **wanted):
    """Tasks of a suite whose attributes, or whose case's, are these."""

    def select(task):
        case = task.case
        found = {name: getattr(task, name, getattr(case, name, None)) for name in wanted}
        return task.suite == suite and (dims is None or (case.head_dim, case.head_dim_v) in dims) and found == wanted

    return select


def sequences(batch, seqlen_k, seqlen_q=1):
    return dict(seqlens_q=(seqlen_q,) * batch, seqlens_k=(seqlen_k,) * batch)


def dims_of(row):
    return row["params"]["head_dim"], row["params"]["head_dim_v"]


def sm80_marks():
    """Engine sm80 beside FlashAttention 2 and FlexAttention."""
    ours = "strobe-sm80"
    marks = []
    for suite, what in (("fwd", "forward"), ("bwd", "backward")):
        same, padded = chosen(suite, FA2_GRID), chosen(suite, FA2_PADDED)
        marks += [
            Mark(f"sm80 {what} d 64, 128, 256 / fa2", same, geomean_speedup("fa2", ours), at_least(1.0)),
            Mark(f"sm80 {what} d 64, 128, 256 / fa2, worst row", same, worst_speedup("fa2", ours), at_least(0.93)),
            Mark(
                f"sm80 {what} of unequal dims / fa2 padded, worst pair",
                padded, worst_group(dims_of, geomean_speedup("fa2", ours)), at_least(1.2),
            ),
        ]  # fmt: skip
    kept = dict(keep_first=4, window=(1000, 0))
    for what, limit in (("forward", 1.4), ("backward", 3.0)):
        select = chosen("window", kind=what, **kept)
        marks.append(
            Mark(f"sm80 {what}, window 1000 + 4 / flex", select, geomean_speedup("flex", ours), at_least(limit))
        )
    for what in ("forward", "backward"):
        marks.append(
            Mark(
                f"sm80 {what}, window 1000 + 4: rate / dense causal",
                either(chosen("window", kind=what, **kept), dense_beside_window(what)),
                rate_share(is_windowed, ours), at_least(0.85),
            )
        )  # fmt: skip
    plain = dict(window=(-1, -1), heads=32)
    marks += [
        Mark("sm80 decode 1 x 32k, us", chosen("decode", **sequences(1, 32768), **plain), largest(ours), at_most(60)),
        Mark("sm80 decode 64 x 8k, TB/s", chosen("decode", **sequences(64, 8192)), smallest(ours), at_least(3.9)),
        Mark(
            "sm80 decode 128 x 4k, pages of 16, TB/s",
            chosen("decode", **sequences(128, 4096)), smallest(ours), at_least(3.5),
        ),
        Mark(
            "sm80 decode, window 2000 + 10 of 128k: time / 2010 keys",
            either(chosen("decode", window=(2000, 0)), chosen("decode", **sequences(16, 2010))),
            rate_share(is_windowed, ours), at_most(1.3),
        ),
        Mark("host time without grad / SDPA's", chosen("host", kind="host"), geomean_time("sdpa"), at_most(1.0)),
    ]  # fmt: skip
    for when, text, limit in (("new", "first call of a new Config, s", 3.0), ("again", "in a second process, s", 0.1)):
        select = either(chosen("jit", kind=f"{when}_forward"), chosen("jit", kind=f"{when}_backward"))
        marks.append(Mark(text, select, largest(), at_most(limit)))
    return marks


def planner_marks():
    """The planner's choice (engine sm90 where it serves) beside the best peer of all."""
    marks = []
    for length, same, unequal in ((16384, 1.03, 1.25), (4096, 1.03, 1.2), (1024, 1.0, 1.1)):
        at = sequences(TOKENS // length, length, length)
        text = f"forward S={length} / best peer, worst row"
        marks.append(Mark(text, chosen("fwd", SAME, **at), worst_speedup(), at_least(same)))
        pairs = UNEQUAL if length != 16384 else UNEQUAL[:-1]
        text = f"forward S={length}, unequal dims / best peer, worst row"
        marks.append(Mark(text, chosen("fwd", pairs, **at), worst_speedup(), at_least(unequal)))
        if pairs != UNEQUAL:
            text = f"forward S={length}, (128, 256) / best peer, worst row"
            marks.append(Mark(text, chosen("fwd", UNEQUAL[-1:], **at), worst_speedup(), at_least(1.4)))
    forward = dict(kind="forward", window=(1000, 0))
    marks += [
        Mark(
            "forward, window 1000 + 4: rate / fa3 and fa4 without kept tokens",
            chosen("window", **forward), kept_beside_best(("fa3", "fa4")), at_least(1.15),
        ),
        Mark(
            "forward, window 1000 + 4 / flex",
            chosen("window", keep_first=4, **forward), geomean_speedup("flex"), at_least(2.3),
        ),
        Mark(
            "forward, window 128, d64 / best peer",
            chosen("window", kind="forward", window=(128, 0)), worst_speedup(), at_least(1.2),
        ),
        Mark(
            "forward, packed 34 to 8k / fa4, worst row",
            chosen("varlen", kind="forward"), worst_speedup("fa4"), at_least(1.1),
        ),
        Mark(
            "decode 1 x 32k, us",
            chosen("decode", **sequences(1, 32768), window=(-1, -1)), largest(), at_most(45),
        ),
        Mark("decode 64 x 8k, TB/s", chosen("decode", **sequences(64, 8192)), smallest(), at_least(4.3)),
        Mark("decode 128 x 4k, pages of 16, TB/s", chosen("decode", **sequences(128, 4096)), smallest(), at_least(4.1)),
        *(
            Mark(
                f"prompts in pages of {size}: rate / dense, worst pair of dims",
                chosen("pages", page_size=size), worst_speedup("strobe-plain"), at_least(0.95),
            )
            for size in (16, 64)
        ),
        Mark(
            "decode 1 x 128k, 64/8: time of 8 tokens / of 1",
            either(chosen("decode", **sequences(1, 131072)), chosen("decode", **sequences(1, 131072, 8))),
            rate_share(lambda row: row["params"]["seqlen_q"] == 8), at_most(1.15),
        ),
        Mark("first forward call of a new Config, s", chosen("jit", kind="new_forward"), largest(), at_most(2.0)),
    ]  # fmt: skip
    return marks


def either(*selects):
    return lambda task: any(select(task) for select in selects)


def is_windowed(row):
    return row["params"]["window"] is not None


def dense_beside_window(kind):
    return chosen("window", kind=kind, window=(-1, -1))


def kept_beside_best(peers):
    """The planner's rate with kept tokens, over the best peer's without: only FlexAttention has them."""

    def figure(rows):
        (kept,) = [row for row in rows if row["params"]["keep_first"]]
        (without,) = [row for row in rows if not row["params"]["keep_first"]]
        return best_figure(kept, ("strobe",)) / best_figure(without, peers)

    return figure


def marks():
    return sm80_marks() + planner_marks()


WORKER = Worker()


def name(device):
    """nvidia-h200, of 'NVIDIA H200, 132 SMs, ...'."""
    return device.split(",")[0].lower().replace(" ", "-")


def device():
    try:
        return WORKER.ask("device")
    except RuntimeError as error:
        raise SystemExit(f"there is no GPU here that PyTorch can use: {error}") from error


def versions():
    return WORKER.ask("versions")


def sources():
    return WORKER.ask("sources")


def notes():
    return [f"not here: {name} ({why})" for name, why in WORKER.ask("absent").items()]


def ceiling():
    return WORKER.ask("ceiling")


def run(task, budget):
    return WORKER.run(task, budget / 3, SYSTEMS)


def choose(names):
    SYSTEMS[:] = [name for name in SYSTEMS if name in names]


def close():
    WORKER.stop(patience=20)
