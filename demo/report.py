"""One self-contained HTML page: no script, no network, light or dark as the reader has it."""

import math
from pathlib import Path

import chart
import masks
import measure
from evaluate import FACTORS, SCORED, SEQUENCES, VARIANTS, summary
from model import AS_TRAINED, DIM, DIM_V, FULL, HEADS, HEADS_K, HEADS_V, KEEP, LAYERS, SLOPES, WIDTH, WINDOW, Mask
from style import CSS, FONT, escape

PAGE_CSS = Path(__file__).with_name("page.css").read_text().replace("FONT", FONT).replace("HEADS", str(HEADS))

# The masks that the demo uses, small enough to see: title, sizes, mask, caption.
PICTURES = (
    ("Full", (10, 10), Mask(), "Causal, nothing else. Half of the layers."),
    ("Window", (10, 10), Mask(3), "The query, and the 3 keys before it."),
    ("Window + kept tokens", (10, 10), Mask(3, 2), "The first 2 tokens stay visible. The other half of the layers."),
    ("Full when decoding", (1, 10), Mask(3, 2, True), "force_fa_decode: one query, so its window is lifted."),
    ("Full from a row on", (10, 10), Mask(3, 2, False, 7), "full_from = 7: from there on every row sees all."),
)  # fmt: skip


def smooth(losses, keep=0.9):
    """(step, bits per byte) of the running mean."""
    mean, weight, points = 0.0, 0.0, []
    for step, loss in enumerate(losses, 1):
        mean, weight = keep * mean + (1 - keep) * loss, keep * weight + 1 - keep
        points.append((step, mean / weight / math.log(2)))
    return points


def loss_charts(trained, twin) -> str:
    raw, theirs = ([(n, x / math.log(2)) for n, x in enumerate(run.losses, 1)] for run in (trained, twin))
    steps = len(theirs)
    gap = max(abs(a - b) for a, b in zip(trained.losses, twin.losses, strict=False))
    whole = [
        chart.Series("", "full", raw, marker="", width=0.8, opacity=0.35),
        chart.Series("running mean", "full", smooth(trained.losses), marker=""),
    ]
    first = [
        chart.Series("SDPA", "peer2", theirs, marker="", width=7, opacity=0.4),
        chart.Series("Strobe", "full", raw[:steps], width=1.4),
    ]
    return row(
        figure(
            chart.lines(whole, "training step", "bits per byte of the batch", right=0.8),
            "Every step, and the running mean.",
        ),
        figure(
            chart.lines(first, "training step", "bits per byte of the batch", right=0.86),
            f"The first {steps} steps on scaled_dot_product_attention with dense masks: same start, same batches. The "
            f"losses differ by at most {gap:.1e} nats.",
        ),
    )


def curve_charts(curves) -> str:
    memory = "Peak memory on top of the inputs. With a mask, SDPA holds S × S of it; Strobe never does."
    figures = []
    for column, unit, caption in (
        (
            1,
            "milliseconds",
            "Time, forward + backward of one layer's attention. The mask is made before. Both axes are logarithmic.",
        ),
        (2, "MiB", memory),
    ):
        series = [
            chart.Series(name, measure.CURVES[name][0], [(p[0], max(p[column], 0.1)) for p in points])
            for name, points in curves.items()
        ]
        ticks = {p[0]: f"{p[0] // 1024}k" if p[0] >= 1024 else str(p[0]) for p in next(iter(curves.values()))}
        drawn = chart.lines(series, "sequence length", unit, log_x=True, log_y=True, ticks=ticks, right=0.7)
        figures.append(figure(drawn, caption))
    return row(*figures)


def bits_chart(evaluation) -> str:
    series = []
    for v in VARIANTS:
        points = list(zip(evaluation.contexts, evaluation.bits[v.name], strict=True))
        series.append(chart.Series(v.name, v.colour, points, dashed=v.colour == "ink"))
    ticks = {c: f"{c} ({f}×)" for c, f in zip(evaluation.contexts, FACTORS, strict=True)}
    unit = "bits per byte, lower is better"
    return chart.lines(series, "bytes of context (times that of training)", unit, log_x=True, ticks=ticks, right=0.6)


def bits_table(evaluation) -> str:
    head = ["mask in every layer", *(f"{c} bytes" for c in evaluation.contexts)]
    rows = [
        [
            f'<i class="key" style="background:var(--{v.colour})"></i>{v.name}',
            *(f"{x:.3f}" for x in evaluation.bits[v.name]),
        ]
        for v in VARIANTS
    ]
    return table(head, rows)


def head_maps(weights) -> str:
    cells = ["<span></span>", *(f'<span class="head">head {h}, slope {SLOPES[h]:g}</span>' for h in range(HEADS))]
    for layer in range(LAYERS):
        windowed = AS_TRAINED[layer] != FULL
        name = f"layer {layer}<br><span class='dim'>{f'window {WINDOW} + {KEEP} kept' if windowed else 'full'}</span>"
        cells.append(f"<span>{name}</span>")
        for head in range(HEADS):
            image = chart.heat(weights[layer][head].float().sqrt().numpy())
            colour, name = "window" if windowed else "full", f"attention weights of layer {layer}, head {head}"
            style = f"background:var(--{colour});-webkit-mask-image:url({image});mask-image:url({image})"
            cells.append(f'<div class="map" role="img" aria-label="{name}"><i style="{style}"></i></div>')
    return f'<div class="maps">{"".join(cells)}</div>'


def figure(picture: str, caption: str, title: str = "") -> str:
    heading = f"<p><b>{title}</b></p>" if title else ""
    return f"<figure>{heading}{picture}<figcaption>{caption}</figcaption></figure>"


def row(*figures: str, kind: str = "") -> str:
    return f'<div class="row {kind}">{"".join(figures)}</div>'


def table(head, rows) -> str:
    cells = "".join(f"<th>{h}</th>" for h in head)
    body = "".join("<tr>" + "".join(f"<td>{c}</td>" for c in r) + "</tr>" for r in rows)
    return f'<div class="scroll"><table><tr>{cells}</tr>{body}</table></div>'


def tiles(items) -> str:
    inner = "".join(f'<div class="tile"><b>{value}</b><span>{name}</span></div>' for value, name in items)
    return f'<div class="tiles">{inner}</div>'


def section(title: str, lead: str, content: str) -> str:
    return f"<h2>{title}</h2>{f'<p>{lead}</p>' if lead else ''}{content}"


def masks_section() -> str:
    pictures = [
        figure(masks.draw(masks.kinds(*size, **mask.options()), title), caption, title)
        for title, size, mask, caption in PICTURES
    ]
    return section(
        "The masks",
        "Drawn from the definition. Strobe was then asked which keys it really sees (the identity matrix as values "
        "shows it) and agrees in every cell.",
        row(*pictures, kind="masks"),
    )


def training_section(run) -> str:
    step = run.agreement
    return section(
        "Training",
        f"Sequences of {run.where.context} bytes. Before the first step, one batch was compared with the same model on "
        f"scaled_dot_product_attention: loss {step.loss:.6f} and {step.loss_sdpa:.6f}, gradients within "
        f"{step.gradient:.1e} (relative, the worst parameter).",
        loss_charts(run.trained, run.twin),
    )


def heads_section(weights) -> str:
    return section(
        "What the trained heads look at",
        f"Attention weights over {weights[0].shape[-1]} bytes of held-out text, computed by Strobe. Rows are queries, "
        "columns keys; stronger colour is more weight (its square root). ALiBi gives each head its own reach; the last "
        "head has none and sees all distances alike.",
        head_maps(weights),
    )


def curves_section(curves) -> str:
    return section(
        "Time and memory",
        f"One layer's heads ({HEADS} / {HEADS_K} / {HEADS_V} of q, k, v; head_dim {DIM}, head_dim_v {DIM_V}), batch 1, "
        "beside scaled_dot_product_attention at its best: heads repeated and padded to one head dim, so that its flash "
        "kernel runs.",
        curve_charts(curves),
    )


def bits_section(evaluation) -> str:
    worst = max(errors[-1] for errors in evaluation.error.values())
    return section(
        "Beyond the training context",
        "The trained weights with another mask in every layer. The same "
        f"{SEQUENCES} × {SCORED} held-out bytes are scored each time; only how much text comes before them changes.",
        row(
            figure(
                bits_chart(evaluation),
                f"{summary(evaluation)} Differences to “full” there have a standard error of at most {worst:.3f}.",
            ),
            figure(
                bits_table(evaluation),
                f"“Full when decoding” reads the text through the window into a KV cache, then takes the {SCORED} "
                "scored bytes one by one, each with full attention (force_fa_decode). One call with full_from gives "
                f"the same logits, within {evaluation.full_from:.1e}.",
            ),
        ),
    )


def text_section(generated) -> str:
    return section(
        "Text, generated with a KV cache",
        "",
        f"<pre><b>{escape(generated.prompt)}</b>{escape(generated.text)}</pre>"
        f"<p class='dim'>{generated.bytes_per_second:,.0f} bytes per second. The logits of all steps were computed "
        f"again in one call without a cache: they differ by at most {generated.difference:.1e}, and the largest logit "
        f"is {generated.logits:.1f}.</p>",
    )


def write(path: Path, run) -> None:
    """`run` is main.Run: everything that the demo found out."""
    intro = (
        f"{run.parameters / 1e6:.2f} million parameters, {LAYERS} layers of width {WIDTH}; {HEADS} query heads, "
        f"{HEADS_K} key heads of dim {DIM}, {HEADS_V} value heads of dim {DIM_V}. Half the layers see a window of "
        f"{WINDOW} bytes and {KEEP} kept tokens, half see everything. Trained on {run.train_bytes:,} bytes of "
        f"CPython's language reference in {run.trained.seconds:.0f} seconds, on {run.where.name} ({run.where.label})."
    )
    parts = [
        f"<h1>A small GPT, its attention all Strobe</h1><p class='dim'>{escape(intro)}</p>",
        tiles(run.tiles),
        training_section(run),
        masks_section(),
        heads_section(run.heads),
        curves_section(run.curves),
        bits_section(run.evaluation),
        text_section(run.generated),
        section("Beside SDPA", "", table(run.table[0], [[escape(c) for c in r] for r in run.table[1:]])),
        f"<p class='dim'>{escape(run.versions)}</p>",
    ]
    page = (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width'><meta name='color-scheme' content='light dark'>"
        f"<title>Strobe demo</title><style>{CSS}{PAGE_CSS}</style></head>"
        f"<body><main>{''.join(parts)}</main></body></html>"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
