"""Text generated with a KV cache, and the proof that the cache changes nothing."""

import time
from typing import NamedTuple

import text
import torch
from model import KVCache

TEMPERATURE = 0.6


class Generated(NamedTuple):
    prompt: str
    text: str
    bytes_per_second: float
    bytes_per_second_uncached: float
    difference: float  # largest |cached - uncached| over all logits of all steps
    logits: float  # the largest logit, to compare with


@torch.no_grad()
def generate(model, prompt: str, count: int, seed: int = 0) -> Generated:
    generator = torch.Generator().manual_seed(seed)
    where = model.embed.weight.device
    tokens = list(prompt.encode())
    start = len(tokens)
    cache = KVCache(1, start + count, model.embed.weight.to(model.dtype))
    cached = []
    begin = time.perf_counter()
    new = tokens
    for _ in range(count):
        logits = model(torch.tensor([new], device=where), attention=cache, last=1)[0, -1].cpu()
        cache.length += len(new)
        cached.append(logits)
        new = [torch.multinomial((logits / TEMPERATURE).softmax(-1), 1, generator=generator).item()]
        tokens += new
    seconds = time.perf_counter() - begin
    # Every step's logits again, without a cache, from the whole text in one call.
    whole = torch.tensor([tokens[:-1]], device=where)
    begin = time.perf_counter()
    uncached = model(whole, last=count)[0].cpu()
    again = time.perf_counter() - begin
    difference = (torch.stack(cached) - uncached).abs().max().item()
    return Generated(
        prompt, text.show(tokens[start:]), count / seconds, 1 / again, difference, uncached.abs().max().item()
    )
