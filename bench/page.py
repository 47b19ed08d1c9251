"""Puts a run's tables into docs/performance.md, between its two marker lines, so that the page and the JSON agree."""

from bench.marks import speedup
from bench.report import number

CURVES = {"fwd": "Forward", "bwd": "Backward (the gradient call alone)"}


def table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def figures(row):
    """'strobe / peer / ... (ratio to each)'."""
    peers = row["peers"]
    text = " / ".join(number(value) for value in (row["strobe"], *peers.values()))
    return text + "".join(f" ({speedup(row, name):.2f}x)" for name in peers)


def curve_table(rows):
    lengths = sorted({row["params"]["seqlen_k"] for row in rows})
    cells = {}
    for row in rows:
        p = row["params"]
        dims = f"d{p['head_dim']}" + (f"/{p['head_dim_v']}" if p["head_dim_v"] != p["head_dim"] else "")
        mask = "causal" if p["causal"] else "full"
        cells.setdefault(f"{p['dtype']} {dims} {mask}", {})[p["seqlen_k"]] = figures(row)
    body = [[name, *(found.get(n, "-") for n in lengths)] for name, found in cells.items()]
    return table(["", *(f"S={n}" for n in lengths)], body)


def tables(document, verdicts):
    rows = document["rows"]
    peers = list(dict.fromkeys(name for row in rows for name in row["peers"]))
    versions = ", ".join(f"{name} {value}" for name, value in document["versions"].items())
    ceiling = ", ".join(f"{name} {number(value)}" for name, value in document["ceiling"].items())
    marks = [
        [text, limit, "-" if figure is None else number(figure), verdict] for text, limit, figure, verdict in verdicts
    ]
    parts = [
        f"{document['device']}; {versions}. Ceiling in the same run: {ceiling}.",
        table(["mark (times faster than SDPA, geometric mean, unless named)", "limit", "measured", ""], marks),
    ]
    for suite, title in CURVES.items():
        chosen = [row for row in rows if row["suite"] == suite]
        if chosen:
            order = " / ".join(["strobe", *peers])
            parts += [f"{title}, {chosen[0]['unit']}, {order}:", curve_table(chosen)]
    others = [[row["suite"], row["case"], row["unit"], figures(row)] for row in rows if row["suite"] not in CURVES]
    parts += ["The other suites:", table(["suite", "case", "unit", " / ".join(["strobe", *peers])], others)]
    return "\n\n".join(parts)


def update(page, name, document, verdicts):
    begin, end = f"<!-- {name}: written by make bench -->", f"<!-- {name}: end -->"
    before, rest = page.read_text().split(begin)
    _, after = rest.split(end)
    page.write_text(f"{before}{begin}\n\n{tables(document, verdicts)}\n\n{end}{after}")
