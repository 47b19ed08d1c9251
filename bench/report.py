"""What a run leaves behind: a table on the screen and a JSON file."""

import json

from bench.cases import params
from bench.marks import speedup


def make_row(task, values):
    """`values`: {system: figure in the task's unit}, "strobe" among them."""
    return {
        "suite": task.suite,
        "case": task.name,
        "params": params(task.case),
        "unit": task.unit,
        "strobe": values["strobe"],
        "peers": {name: value for name, value in values.items() if name != "strobe"},
    }


def write_json(path, device, versions, ceiling, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    document = dict(device=device, versions=versions, ceiling=rounded(ceiling), rows=rounded(rows))
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


def heading(suite, systems):
    peers = [name for name in systems if name != "strobe"]
    columns = "".join(f"{name:>12}" for name in systems) + "".join(f"{'x ' + name:>12}" for name in peers)
    return f"\n{suite:58}{'':>8}{columns}"


def line(row, systems):
    peers = [name for name in systems if name != "strobe"]
    figures = {"strobe": row["strobe"], **row["peers"]}
    cells = [number(figures[name]) if name in figures else "-" for name in systems]
    cells += [f"{speedup(row, name):.2f}x" if name in figures else "-" for name in peers]
    return f"{row['case']:58}{row['unit']:>8}" + "".join(f"{cell:>12}" for cell in cells)


def verdict_table(verdicts):
    lines = [f"\n{'mark':58}{'limit':>16}{'measured':>12}"]
    for text, limit, figure, verdict in verdicts:
        lines.append(f"{text:58}{limit:>16}{'-' if figure is None else number(figure):>12}  {verdict}")
    return "\n".join(lines)
