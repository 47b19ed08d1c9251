"""What a run leaves behind: a table on the screen and a JSON file."""

import json

from bench.cases import params
from bench.marks import best_of, figures_of, speedup


def is_ours(name):
    return name.startswith("strobe")


def make_row(task, values):
    """`values`: {system: figure in the task's unit, or a sentence that says why it has none}."""
    figures = {name: value for name, value in values.items() if not isinstance(value, str)}
    row = {
        "suite": task.suite,
        "case": task.name,
        "params": params(task.case),
        "unit": task.unit,
        "strobe": figures.pop("strobe", None),
        "peers": {name: value for name, value in figures.items() if not is_ours(name)},
    }
    # Engines that were forced, and what went wrong: only where there are any.
    row |= {"engines": engines} if (engines := {n: v for n, v in figures.items() if is_ours(n)}) else {}
    row |= {"failed": failed} if (failed := {n: v for n, v in values.items() if isinstance(v, str)}) else {}
    return row


def write_json(path, document):
    path.parent.mkdir(parents=True, exist_ok=True)
    document = rounded(document)
    path.write_text(json.dumps(document, indent=1) + "\n")
    return document


def rounded(value):
    """Four digits are more than any figure here is worth, and keep a new run's difference readable."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def number(value):
    return f"{value:.0f}" if value >= 1000 else f"{value:.4g}"


def cell(row, name):
    found = figures_of(row)
    if name in found:
        return number(found[name])
    return "failed" if name in row.get("failed", {}) else "-"


def ratio(row, peer, ours="strobe"):
    found = figures_of(row)
    return f"{speedup(row, peer, ours):.2f}x" if peer in found and ours in found else "-"


def peers_of(systems):
    return [name for name in systems if not is_ours(name)]


def heading(suite, systems):
    """A column for each system; one for the ratio to each peer, or to the best one where there are many."""
    peers = peers_of(systems)
    ratios = [f"x {name}" for name in peers] if len(peers) < 3 else ["x best"]
    columns = "".join(f"{name:>12}" for name in (*systems, *ratios))
    return f"\n{suite:62}{'':>8}{columns}"


def line(row, systems):
    peers = peers_of(systems)
    cells = [cell(row, name) for name in systems]
    if len(peers) < 3:
        cells += [ratio(row, name) for name in peers]
    else:
        best = best_of(row, peers)
        cells.append(ratio(row, best[0]) + f" {best[0]}" if best else "-")
    lines = [f"{row['case']:62}{row['unit']:>8}" + "".join(f"{cell:>12}" for cell in cells)]
    lines += [f"    {name} failed: {why}" for name, why in row.get("failed", {}).items()]
    return "\n".join(lines)


def verdict_table(verdicts):
    lines = [f"\n{'mark':66}{'limit':>16}{'measured':>12}"]
    for text, limit, figure, verdict in verdicts:
        lines.append(f"{text:66}{limit:>16}{'-' if figure is None else number(figure):>12}  {verdict}")
    return "\n".join(lines)
