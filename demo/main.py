"""Trains a small GPT on real text, attention all Strobe, checks it against SDPA and writes demo/out/report.html."""

import argparse
import platform
import time
from pathlib import Path
from typing import NamedTuple

import look
import measure
import report
import text
import torch
from device import CPU_CONTEXT, Device, device
from evaluate import SCORED, Evaluation, evaluate, summary
from generate import Generated, generate
from model import GPT, loss_of, sdpa_attention, strobe_attention
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from train import SHARED, Agreement, Trained, compare_step, train

import strobe

OUT = Path(__file__).parent / "out" / "report.html"
PROMPT = 'The "for" statement is used to '
LONGER = 16  # the long training step of the table, in training contexts


class Run(NamedTuple):
    """What the demo found out; report.py shows it."""

    where: Device
    versions: str
    parameters: int
    train_bytes: int
    agreement: Agreement
    trained: Trained
    twin: Trained  # the first steps again, on SDPA
    evaluation: Evaluation
    generated: Generated
    heads: list  # attention weights, per layer
    curves: dict
    table: list  # rows of text, the first is the head
    tiles: list  # (value, what it is)


def require(holds: bool, what: str) -> None:
    if not holds:
        raise SystemExit(f"FAILED: {what}")


def new_model(where: Device) -> GPT:
    torch.manual_seed(0)
    return GPT(where.dtype).to(where.name)


def beside_sdpa(model, train_text, where: Device, trained: Trained, twin: Trained) -> list:
    """The final table: Strobe and SDPA on the same training steps."""
    rows = [["", "Strobe", "SDPA, dense masks"]]
    n = min(len(twin.losses), len(trained.losses))
    rows.append([f"loss after {n} steps", f"{trained.losses[n - 1]:.5f}", f"{twin.losses[n - 1]:.5f}"])
    short = next(text.batches(train_text, where.context, where.tokens // where.context, 5))
    long = next(text.batches(train_text, where.context * LONGER, 1, 5))
    for batch in (short, long):
        size, length = batch.shape[0], batch.shape[1] - 1
        ours, theirs = (
            measure.training_step(model, batch.to(where.name), loss_of, attention, where)
            for attention in (strobe_attention, sdpa_attention)
        )
        rows.append([f"training step, {size} × {length} bytes", f"{ours[0]:,.0f} ms", f"{theirs[0]:,.0f} ms"])
        rows.append([f"its memory, {size} × {length} bytes", f"{ours[1]:,.0f} MiB", f"{theirs[1]:,.0f} MiB"])
    return rows


def show_table(console: Console, title: str, rows) -> None:
    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
    for n, name in enumerate(rows[0]):
        table.add_column(name, justify="right" if n else "left")
    for row in rows[1:]:
        table.add_row(*row)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=700, help="training steps at most")
    parser.add_argument("--seconds", type=float, default=130, help="training time at most")
    parser.add_argument("--out", type=Path, default=OUT, help="where the page goes")
    arguments = parser.parse_args()
    begin, console, where = time.perf_counter(), Console(), device()
    train_text, held_out = text.load()
    model = new_model(where)
    parameters = sum(p.numel() for p in model.parameters())
    if where.note:
        console.print(f"[yellow]{where.note}; using the CPU[/]")
    console.print(
        f"[bold]Strobe {strobe.__version__}[/] on {where.name} ({where.label}): {parameters / 1e6:.2f} million "
        f"parameters, sequences of {where.context} bytes, {len(train_text):,} bytes of text, {len(held_out):,} held out"
    )
    if where.name == "cuda":
        longest = f"{where.lengths[-1]:,} keys"
        console.print(
            f"on this GPU {where.context // CPU_CONTEXT} times the context of a CPU, time and memory to {longest}"
        )

    size = where.tokens // where.context
    agreement = compare_step(model, next(text.batches(train_text, where.context, size, 1)).to(where.name))
    console.print(
        f"one step beside scaled_dot_product_attention: loss {agreement.loss:.6f} / {agreement.loss_sdpa:.6f}, "
        f"gradients within {agreement.gradient:.1e}"
    )
    require(abs(agreement.loss - agreement.loss_sdpa) <= where.gradient, "the losses of one step differ")
    require(agreement.gradient <= where.gradient, "the gradients of one step differ")
    for title, sizes, mask, _ in report.PICTURES:
        require(look.agrees(*sizes, mask, where), f"Strobe sees other keys than the picture of the mask: {title}")

    shared = min(SHARED, arguments.steps)  # all of them warm-up: the same rates in both runs
    twin = train(
        new_model(where), text.batches(train_text, where.context, size, 2), shared, float("inf"), console,
        sdpa_attention, "first steps, SDPA",
    )  # fmt: skip
    batches = text.batches(train_text, where.context, size, 2)
    trained = train(model, batches, arguments.steps, arguments.seconds, console)

    with console.status("") as status:
        evaluation = evaluate(model, held_out, where.context, lambda name: status.update(f"bits per byte: {name}"))
        require(
            evaluation.full_from <= where.logits, "decoding with force_fa_decode differs from one call with full_from"
        )
        status.update("generating")
        generated = generate(model, PROMPT, 400)
        require(generated.difference <= where.logits, "the KV cache changes the logits")
        heads = look.heads(model, held_out[2000 : 2000 + 112].to(where.name))
        curves = measure.attention_curves(where, lambda name: status.update(f"time and memory: {name}"))
        status.update("training steps beside SDPA")
        table = beside_sdpa(model, train_text, where, trained, twin)

    bits = [["mask in every layer", *(f"{c} bytes" for c in evaluation.contexts)]]
    bits += [[name, *(f"{b:.3f}" for b in row)] for name, row in evaluation.bits.items()]
    show_table(console, f"Bits per byte of the same {SCORED}-byte ends, by context", bits)
    console.print(summary(evaluation))
    show_table(console, "Beside scaled_dot_product_attention", table)
    console.print(Panel(Text.assemble((PROMPT, "bold"), generated.text), title="generated with a KV cache"))
    console.print(f"cached logits equal uncached ones within {generated.difference:.1e} at all 400 steps")

    longest, last = max(curves["SDPA, window + kept"])[0], "Strobe, window + kept"
    at = {name: dict((n, (ms, mib)) for n, ms, mib in points) for name, points in curves.items()}
    faster = at["SDPA, window + kept"][longest][0] / at[last][longest][0]
    tiles = [
        (f"{evaluation.held_out:.2f}", "bits per byte on held-out text"),
        (f"{trained.bytes_per_second:,.0f}", "bytes per second in training"),
        (f"{faster:.0f}×", f"as fast as SDPA with the window mask, {longest // 1024}k keys, forward + backward"),
        (f"{generated.difference:.0e}", "largest difference of cached and uncached logits"),
    ]
    versions = (
        f"Strobe {strobe.__version__}, PyTorch {torch.__version__}, Python {platform.python_version()}, "
        f"{platform.machine()}; {time.perf_counter() - begin:.0f} s in all."
    )
    run = Run(
        where, versions, parameters, len(train_text), agreement, trained, twin, evaluation, generated, heads, curves,
        table, tiles,
    )  # fmt: skip
    report.write(arguments.out, run)
    console.print(f"{time.perf_counter() - begin:.0f} s; the page: [bold]{arguments.out}[/]")


if __name__ == "__main__":
    main()
