"""Training with a live loss, and the proof beside the same model on scaled_dot_product_attention."""

import math
import time
from typing import NamedTuple

import torch
from model import loss_of, sdpa_attention, strobe_attention
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

RATE, WARMUP, SHARED = 3e-3, 20, 20  # peak learning rate; steps of warm-up; first steps repeated on SDPA
BARS = "▁▂▃▄▅▆▇█"


class Trained(NamedTuple):
    losses: list  # nats per byte, one per step
    seconds: float
    bytes_per_second: float


class Agreement(NamedTuple):
    """One step of the same model on both attentions."""

    loss: float
    loss_sdpa: float
    gradient: float  # the worst |ours - theirs| / |theirs| over the parameters, in the 2-norm


def compare_step(model, batch) -> Agreement:
    """Loss and gradients of one step, attention by Strobe and by SDPA with dense masks."""
    losses, gradients = [], []
    for attention in (strobe_attention, sdpa_attention):
        model.zero_grad()
        loss = loss_of(model, batch, attention=attention)
        loss.backward()
        losses.append(loss.item())
        gradients.append([p.grad.clone() for p in model.parameters()])
    model.zero_grad()
    worst = max(((a - b).norm() / b.norm()).item() for a, b in zip(*gradients, strict=True))
    return Agreement(*losses, worst)


def spark(losses, width=16) -> str:
    """The loss so far in one line of text."""
    if not losses:
        return ""
    columns = [losses[len(losses) * n // width] for n in range(width)] if len(losses) >= width else losses
    low, high = min(columns), max(columns)
    return "".join(BARS[round((x - low) / max(high - low, 1e-9) * (len(BARS) - 1))] for x in columns)


def rate_at(step: int, done: float) -> float:
    """Warm-up, then a cosine down to a tenth; done: share of the run that lies behind."""
    if step < WARMUP:
        return RATE * (step + 1) / WARMUP
    return RATE * (0.55 + 0.45 * math.cos(math.pi * done))


def train(model, batches, steps: int, seconds: float, console, attention=strobe_attention, title="training"):
    """`steps` steps or `seconds`, whichever is over first. Muon for the blocks' matrices and AdamW for the rest."""
    matrices = [p for p in model.blocks.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if all(p is not m for m in matrices)]
    optimizers = (
        torch.optim.Muon(matrices, lr=RATE, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=RATE, betas=(0.9, 0.98), weight_decay=0.0),
    )
    where = model.embed.weight.device
    losses, done = [], 0
    columns = (
        TextColumn("{task.description}"), BarColumn(12), TextColumn("{task.completed}/{task.total}"),
        TextColumn("[bold]loss {task.fields[loss]}[/]"), TextColumn("[cyan]{task.fields[spark]}[/]"),
        TextColumn("{task.fields[rate]}"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=steps, loss="", spark="", rate="")
        begin = time.perf_counter()
        for step in range(steps):
            share = max(step / steps, (time.perf_counter() - begin) / seconds)
            if share >= 1:
                break
            for optimizer in optimizers:
                optimizer.param_groups[0]["lr"] = rate_at(step, share)
                optimizer.zero_grad()
            batch = next(batches).to(where)
            loss = loss_of(model, batch, attention=attention)
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
            losses.append(loss.item())
            done += batch[:, 1:].numel()
            rate = done / (time.perf_counter() - begin)
            progress.update(
                task, advance=1, loss=f"{losses[-1]:.3f}", spark=spark(losses), rate=f"{rate / 1000:.1f} kB/s"
            )
            if not console.is_terminal and len(losses) % 100 == 0:
                console.print(f"  {title}: step {len(losses)}/{steps}  loss {losses[-1]:.3f}  {rate:,.0f} bytes/s")
    if not console.is_terminal:
        console.print(f"  {title}: {len(losses)} steps  loss {losses[-1]:.3f}  {rate:,.0f} bytes/s")
    return Trained(losses, time.perf_counter() - begin, rate)
