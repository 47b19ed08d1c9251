"""Bits per byte beyond the training context, with the mask of every layer changed after training.

The same held-out bytes are scored for every context and mask; only what the model sees before them differs.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from model import AS_TRAINED, FULL, LAYERS, WINDOW, WINDOWED, KVCache, Mask, loss_of

SEQUENCES, SCORED = 12, 128  # held-out places, and bytes scored at the end of each
FACTORS = (1, 4, 16)  # times the training context


class Variant(NamedTuple):
    name: str
    colour: str  # a class of style.CSS
    layers: tuple  # a Mask for each layer
    decoded: bool = False  # the scored bytes go through the KV cache one by one


VARIANTS = (
    Variant("as trained", "ink", AS_TRAINED),
    Variant("full", "full", (FULL,) * LAYERS),
    Variant("window only", "window", (Mask(WINDOW),) * LAYERS),
    Variant("window + kept tokens", "kept", (WINDOWED,) * LAYERS),
    Variant("window + kept, full when decoding", "decode", (WINDOWED._replace(force_fa_decode=True),) * LAYERS, True),
)


class Evaluation(NamedTuple):
    held_out: float  # bits per byte of all held-out text, in pieces of the training context, masks as trained
    contexts: list
    bits: dict  # variant name -> bits per byte for each context
    error: dict  # variant name -> standard error of its difference to "full", for each context
    full_from: float  # largest difference of logits: decoded one by one, and in one call with full_from


def summary(evaluation: Evaluation) -> str:
    """What the figures say, in a sentence."""
    last = {name: bits[-1] for name, bits in evaluation.bits.items()}
    best, worst = min(last, key=last.get), max(last, key=last.get)
    change = {name: bits[-1] - bits[0] for name, bits in evaluation.bits.items()}
    return (
        f"With {FACTORS[-1]} times the training context “{best}” is best ({last[best]:.3f}) and “{worst}” worst "
        f"({last[worst]:.3f}). From {FACTORS[0]} to {FACTORS[-1]} times, “full” changes by {change['full']:+.3f} bits "
        f"and “window + kept tokens” by {change['window + kept tokens']:+.3f}."
    )


def places(held_out, context: int, longest: int):
    """Inputs [SEQUENCES, context] and their next bytes; the last SCORED bytes are the same for every context."""
    ends = torch.linspace(longest, len(held_out) - 1, SEQUENCES).long()
    rows = torch.stack([held_out[end - context : end + 1] for end in ends])
    return rows[:, :-1], rows[:, 1:]


def decode(model, tokens, layers):
    """Logits of the last SCORED positions: all before them in one call, they themselves one by one."""
    cache = KVCache(tokens.shape[0], tokens.shape[1], model.embed.weight.to(model.dtype))
    cut = tokens.shape[1] - SCORED
    model(tokens[:, :cut], attention=cache, layers=layers, last=1)
    cache.length, logits = cut, []
    for n in range(cut, tokens.shape[1]):
        logits.append(model(tokens[:, n : n + 1], attention=cache, layers=layers))
        cache.length += 1
    return torch.cat(logits, 1)


@torch.no_grad()
def evaluate(model, held_out, context: int, tick=lambda name: None) -> Evaluation:
    contexts = [context * f for f in FACTORS]
    pieces = held_out[: len(held_out) // (context + 1) * (context + 1)].unflatten(0, (-1, context + 1))
    whole = loss_of(model, pieces.to(model.embed.weight.device)).item() / math.log(2)
    bits, error, worst = {v.name: [] for v in VARIANTS}, {v.name: [] for v in VARIANTS}, 0.0
    for length in contexts:
        tokens, targets = (t.to(model.embed.weight.device) for t in places(held_out, length, contexts[-1]))
        scored = {}
        for variant in VARIANTS:
            tick(f"{variant.name}, {length} bytes")
            if variant.decoded:
                logits = decode(model, tokens, variant.layers)
                if length == contexts[1]:  # the same rule in one call: rows from full_from on have no left bound
                    lifted = tuple(m._replace(full_from=length - SCORED) for m in variant.layers)
                    worst = (logits - model(tokens, layers=lifted, last=SCORED)).abs().max().item()
            else:
                logits = model(tokens, layers=variant.layers, last=SCORED)
            nats = F.cross_entropy(logits.flatten(0, 1), targets[:, -SCORED:].flatten(), reduction="none")
            scored[variant.name] = nats.unflatten(0, (SEQUENCES, SCORED)).mean(1) / math.log(2)
        for name, each in scored.items():
            bits[name].append(each.mean().item())
            error[name].append(((each - scored["full"]).std() / SEQUENCES**0.5).item())
    return Evaluation(whole, contexts, bits, error, worst)
