"""Draws a result file: python -m bench.plot FILE.json writes FILE.svg beside it (needs matplotlib)."""

import json
import sys
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from bench.marks import speedup

COLORS = ["#d1495b", "#30638e", "#edae49", "#00798c", "#7a5195", "#5b5b5b"]
CURVES = ("fwd", "bwd")  # suites drawn against the sequence length; the others become bars


def curve_panel(axes, rows, title, systems, ceiling):
    for index, name in enumerate(systems):
        for causal, style in ((False, "-"), (True, "--")):
            points = sorted(
                (row["params"]["seqlen_k"], row["strobe"] if name == "strobe" else row["peers"][name])
                for row in rows
                if row["params"]["causal"] == causal and (name == "strobe" or name in row["peers"])
            )
            if points:
                text = f"{name}, {'causal' if causal else 'full'}"
                axes.plot(*zip(*points, strict=True), style, marker="o", ms=3, color=COLORS[index], label=text)
    if ceiling:
        axes.axhline(ceiling, color="#bbbbbb", lw=1, ls=":", label="matmul")
    axes.set_xscale("log", base=2)
    lengths = sorted({row["params"]["seqlen_k"] for row in rows})
    axes.set_xticks(lengths, [f"{n // 1024}k" if n % 1024 == 0 else str(n) for n in lengths])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_title(title, fontsize=9)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def bar_panel(axes, rows, peers):
    """Speedups of all other rows. The bars' logarithmic axis has 1 in the middle of wins and losses."""
    bars = [(row, peer) for row in rows for peer in peers if peer in row["peers"]]
    labels, values, colors = [], [], []
    for row, peer in bars:
        name = f"{row['suite']}: {row['case']}" if len(peers) == 1 else f"{row['suite']}: {row['case']} / {peer}"
        labels.append(name)
        values.append(speedup(row, peer))
        colors.append(COLORS[1 + peers.index(peer)] if len(peers) > 1 else COLORS[0])
    places = range(len(bars))
    axes.barh(places, [v - 1 for v in values], left=1, color=colors, height=0.7)
    for at, value in zip(places, values, strict=True):
        axes.annotate(
            f"{value:.2f}x", (max(value, 1), at), xytext=(4, 0), textcoords="offset points", va="center", fontsize=7
        )
    axes.set_yticks(places, labels, fontsize=7)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}x")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.axvline(1, color="black", lw=0.8)
    axes.set_xlim(min(0.5, *values) * 0.9, max(2, *values) * 1.6)
    axes.set_title("all other rows: how many times better than the peer (1 = the same)", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def panels_of(rows):
    """{(dtype, head_dim, head_dim_v): rows} in the order of the file."""
    groups = {}
    for row in rows:
        key = tuple(row["params"][name] for name in ("dtype", "head_dim", "head_dim_v"))
        groups.setdefault(key, []).append(row)
    return groups


def plot(path):
    document = json.loads(Path(path).read_text())
    rows = document["rows"]
    peers = list(dict.fromkeys(name for row in rows for name in row["peers"]))
    others = [row for row in rows if row["suite"] not in CURVES and row["peers"]]
    curves = {suite: panels_of([row for row in rows if row["suite"] == suite]) for suite in CURVES}
    curves = {suite: groups for suite, groups in curves.items() if groups}
    columns = max([len(groups) for groups in curves.values()], default=1)
    bars = sum(len(row["peers"]) for row in others)
    heights = [2.9] * len(curves) + ([0.6 + 0.2 * bars] if others else [])
    if not heights:
        raise ValueError(f"{path} holds no row with a peer")

    # Text stays text and ids do not change from run to run: the file is small and its changes can be read.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "strobe", "font.family": "sans-serif"}):
        figure = Figure(figsize=(max(9, 2.8 * columns), sum(heights) + 0.5), layout="constrained")
        figure.suptitle(f"Strobe on {document['device']}", fontsize=11)
        # A part of its own for the bars, so that their long names do not narrow the curves.
        parts = iter(figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0])
        for suite, groups in curves.items():
            part = next(parts)
            for column, ((dtype, d, dv), group) in enumerate(groups.items()):
                axes = part.add_subplot(1, columns, column + 1)
                dims = f"d{d}" if d == dv else f"d{d}/{dv}"
                ceiling = document["ceiling"].get(f"matmul {dtype} GFLOP/s")
                curve_panel(axes, group, f"{suite}, {dtype}, {dims}", ["strobe", *peers], ceiling)
                if column == 0:
                    axes.set_ylabel(group[0]["unit"])
            handles, labels = axes.get_legend_handles_labels()
            part.legend(handles, labels, loc="outside lower center", ncols=8, fontsize=8, frameon=False)
        if others:
            bar_panel(next(parts).add_subplot(), others, peers)
        target = Path(path).with_suffix(".svg")
        figure.savefig(target, metadata={"Date": None})
    return target


if __name__ == "__main__":
    print(plot(sys.argv[1]))
