"""Puts a run's tables into docs/performance.md, between its two marker lines, so that the page and the JSON agree."""

from bench.marks import figures_of
from bench.report import number, ratio

CURVES = {"fwd": "Forward", "bwd": "Backward (the gradient call alone)"}


def table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def figures(row):
    """'strobe / peer / ... (ratio to each)'."""
    text = " / ".join(number(value) for value in figures_of(row).values())
    return text + "".join(f" ({ratio(row, name)})" for name in row["peers"])


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


def header(document):
    versions = ", ".join(f"{name} {value}" for name, value in document["versions"].items())
    ceiling = ", ".join(f"{name} {number(value)}" for name, value in document["ceiling"].items())
    return f"{document['device']}; {versions}. Ceiling, the best that these runs saw: {ceiling}."


def mark_table(title, verdicts):
    marks = [
        [text, limit, "-" if figure is None else number(figure), verdict] for text, limit, figure, verdict in verdicts
    ]
    return table([title, "limit", "measured", ""], marks)


def tables(document, verdicts):
    rows = document["rows"]
    peers = list(dict.fromkeys(name for row in rows for name in row["peers"]))
    title = "mark (times faster than SDPA, geometric mean, unless named)"
    parts = [header(document), mark_table(title, verdicts)]
    for suite, title in CURVES.items():
        chosen = [row for row in rows if row["suite"] == suite]
        if chosen:
            order = " / ".join(["strobe", *peers])
            parts += [f"{title}, {chosen[0]['unit']}, {order}:", curve_table(chosen)]
    others = [[row["suite"], row["case"], row["unit"], figures(row)] for row in rows if row["suite"] not in CURVES]
    parts += ["The other suites:", table(["suite", "case", "unit", " / ".join(["strobe", *peers])], others)]
    return "\n\n".join(parts)


def update(page, name, text):
    """Replaces what lies between the name's two markers; False if the page has none."""
    begin, end = f"<!-- {name}: written by the benchmark -->", f"<!-- {name}: end -->"
    before, found, rest = page.read_text().partition(begin)
    _, ended, after = rest.partition(end)
    if found and ended:
        page.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}")
    return bool(found and ended)
