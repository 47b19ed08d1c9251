"""Draws a result file: python -m bench.plot FILE.json writes FILE.svg beside it (needs matplotlib)."""

import json
import sys
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from bench.marks import figures_of, speedup

STROBE = "#d1495b"
COLORS = ["#30638e", "#edae49", "#00798c", "#7a5195", "#5b5b5b", "#8cb369"]
FEW = 2  # systems that full and causal curves of one panel can hold
CURVES = ("fwd", "bwd")  # suites drawn against the sequence length; the others become bars


def colors_of(systems):
    """Strobe's engines share a colour."""
    peers = [name for name in systems if not name.startswith("strobe")]
    return {name: COLORS[peers.index(name) % len(COLORS)] if name in peers else STROBE for name in systems}


def curve_panel(axes, rows, title, systems, ceiling):
    """Full and causal curves where both are among the rows."""
    colors, masks = colors_of(systems), sorted({row["params"]["causal"] for row in rows})
    for name in systems:
        for causal in masks:
            points = sorted(
                (row["params"]["seqlen_k"], figures_of(row)[name])
                for row in rows
                if row["params"]["causal"] == causal and name in figures_of(row)
            )
            if points:
                text = f"{name}, {'causal' if causal else 'full'}" if len(masks) > 1 else name
                dashed = name.startswith("strobe-") or (causal and len(masks) > 1)
                style = dict(ls="--" if dashed else "-", lw=2 if name == "strobe" else 1.2, marker="o", ms=3)
                axes.plot(*zip(*points, strict=True), color=colors[name], label=text, **style)
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
    labels, values, colors, known = [], [], [], colors_of(peers)
    for row, peer in bars:
        name = f"{row['suite']}: {row['case']}" if len(peers) == 1 else f"{row['suite']}: {row['case']} / {peer}"
        labels.append(name)
        values.append(speedup(row, peer))
        colors.append(known[peer] if len(peers) > 1 else STROBE)
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


def panels_of(rows, by_mask):
    """{title: rows} in the order of the file."""
    groups = {}
    for row in rows:
        p = row["params"]
        d, dv = p["head_dim"], p["head_dim_v"]
        title = f"{row['suite']}, {p['dtype']}, d{d}" + (f"/{dv}" if dv != d else "")
        if by_mask:
            title += ", causal" if p["causal"] else ", full"
        groups.setdefault(title, []).append(row)
    return groups


def draw_curves(part, groups, columns, systems, ceilings):
    for place, (title, group) in enumerate(groups.items()):
        axes = part.add_subplot(-(-len(groups) // columns), columns, place + 1)
        unit = group[0]["unit"]
        curve_panel(axes, group, title, systems, ceilings.get(f"matmul {group[0]['params']['dtype']} {unit}"))
        if place % columns == 0:
            axes.set_ylabel(unit)
    named = {}
    for axes in part.get_axes():
        handles, labels = axes.get_legend_handles_labels()
        named |= dict(zip(labels, handles, strict=True))
    part.legend(named.values(), named.keys(), loc="outside lower center", ncols=8, fontsize=8, frameon=False)


def plot(path):
    """The picture's path, or None where no row has a peer to be beside."""
    document = json.loads(Path(path).read_text())
    rows = document["rows"]
    systems = list(dict.fromkeys(["strobe", *(name for row in rows for name in figures_of(row))]))
    peers = [name for name in systems if not name.startswith("strobe")]
    others = [row for row in rows if row["suite"] not in CURVES and row["peers"] and row["strobe"] is not None]
    by_mask = len(systems) > FEW
    curves = {suite: panels_of([row for row in rows if row["suite"] == suite], by_mask) for suite in CURVES}
    curves = {suite: groups for suite, groups in curves.items() if groups}
    columns = min(6, max([len(groups) for groups in curves.values()], default=1))
    bars = sum(len(row["peers"]) for row in others)
    heights = [0.4 + 2.5 * -(-len(groups) // columns) for groups in curves.values()]
    heights += [0.6 + 0.2 * bars] if others else []
    if not heights:
        return None

    # Text stays text and ids do not change from run to run: the file is small and its changes can be read.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "strobe", "font.family": "sans-serif"}):
        figure = Figure(figsize=(max(9, 2.8 * columns), sum(heights) + 0.5), layout="constrained")
        figure.suptitle(f"Strobe on {document['device']}", fontsize=11)
        # A part of its own for the bars, so that their long names do not narrow the curves.
        parts = iter(figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0])
        for groups in curves.values():
            draw_curves(next(parts), groups, columns, systems, document["ceiling"])
        if others:
            bar_panel(next(parts).add_subplot(), others, peers)
        target = Path(path).with_suffix(".svg")
        figure.savefig(target, metadata={"Date": None})
    return target


if __name__ == "__main__":
    print(plot(sys.argv[1]))
