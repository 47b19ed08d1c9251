"""The GPU's part of docs/performance.md: marks, wins and losses, and a table per suite."""

from bench.marks import BEST, best_of, figures_of, geomean, speedup
from bench.page import header, mark_table, table
from bench.report import cell, is_ours, number, ratio

TITLES = {
    "fwd": "Forward",
    "bwd": "Backward (the gradient call alone)",
    "window": "Windows (rates count visible pairs)",
    "decode": "Decoding (TB/s of visible keys and values)",
    "prompt": "Prompts of one sequence and few heads",
    "pages": "Prompts whose keys lie in pages (strobe-plain: the same call on plain tensors)",
    "append": "Appending to a cache, with rotary embedding, and attending",
    "host": "Host time of a call",
    "jit": "First calls",
    "varlen": "Packed sequences of mixed lengths",
}


def systems_of(rows):
    """Those with a figure or a failure in these rows: Strobe's engines, then peers in the order of BEST."""
    found = {name for row in rows for name in (*figures_of(row), *row.get("failed", {}))}
    return sorted(filter(is_ours, found)) + [name for name in BEST if name in found]


def suite_table(rows):
    systems = systems_of(rows)
    peers = [name for name in systems if not is_ours(name)]
    body = []
    for row in rows:
        best = best_of(row, peers)
        last = f"{ratio(row, best[0])} {best[0]}" if best else "-"
        body.append([row["case"], row["unit"], *(cell(row, name) for name in systems), last])
    return table(["case", "unit", *systems, "strobe / best peer"], body)


def compared(rows):
    """[(speedup over the best peer, its name, row)] of rows that have both."""
    found = [(best_of(row, BEST), row) for row in rows if row["strobe"] is not None]
    return [(speedup(row, best[0]), best[0], row) for best, row in found if best]


def win_table(rows):
    body = []
    for suite in dict.fromkeys(row["suite"] for row in rows):
        all = compared([row for row in rows if row["suite"] == suite])
        if all:
            ratios = [value for value, _, _ in all]
            won = sum(value >= 1 for value in ratios)
            body.append([suite, f"{won} of {len(all)}", *(f"{f(ratios):.2f}x" for f in (geomean, min, max))])
    return table(["suite", "rows won", "geometric mean", "worst", "best"], body)


def loss_table(rows):
    lost = sorted((entry for entry in compared(rows) if entry[0] < 1), key=lambda entry: entry[0])
    body = [
        [row["suite"], row["case"], f"{number(row['strobe'])} {row['unit']}", f"{number(figures_of(row)[peer])} {peer}",
         f"{value:.2f}x"]
        for value, peer, row in lost
    ]  # fmt: skip
    return table(["suite", "case", "strobe", "best peer", ""], body) if body else "None."


def failure_table(rows):
    body = [
        [row["suite"], row["case"], name, why.replace("|", "\\|")]
        for row in rows
        for name, why in row.get("failed", {}).items()
    ]
    return table(["suite", "case", "system", "why"], body) if body else "None."


def origins(document):
    """Which sources each suite was measured with, where they differ."""
    sources = document.get("sources")
    if not isinstance(sources, dict):
        return []
    suites = {}
    for suite, digest in sources.items():
        suites.setdefault(digest[:12], []).append(suite)
    each = "; ".join(f"{', '.join(names)}: {digest}" for digest, names in suites.items())
    return [f"Not all of one state of the sources (the digests begin as `tests/gpu/receipt.json`'s do): {each}."]


def absent(document):
    """Which suites lacked a peer that others had."""
    lacking = "; ".join(f"{name} in {', '.join(suites)}" for name, suites in document.get("without", {}).items())
    return [f"Not there when these were measured: {lacking}."] if lacking else []


def tables(document, verdicts):
    rows = document["rows"]
    parts = [
        header(document),
        *origins(document),
        *absent(document),
        mark_table("mark (times better, geometric mean, unless named)", verdicts),
        "Wins, the planner's choice beside the best peer of each row:",
        win_table(rows),
        "Losses, worst first:",
        loss_table(rows),
    ]
    for suite, title in TITLES.items():
        chosen = [row for row in rows if row["suite"] == suite]
        if chosen:
            parts += [f"{title}:", suite_table(chosen)]
    return "\n\n".join([*parts, "What failed:", failure_table(rows)])
