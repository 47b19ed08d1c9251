"""Trains a small GPT on real text with all attention by Strobe, checks it against SDPA, generates with a KV cache."""

import argparse
import math
import time
from pydoc_data import topics

import torch
import torch.nn.functional as F
from torch import nn

import strobe

CONTEXT, WIDTH, LAYERS = 256, 128, 4
HEADS, HEADS_K, HEADS_V, DIM, DIM_V = 4, 2, 4, 32, 64
WINDOW, KEEP = 48, 4


def slopes() -> torch.Tensor:
    return torch.tensor([2.0 ** (-2 * (h + 1)) for h in range(HEADS)])


def dense_attention(q, k, v, window: int, keep: int):
    """The same by scaled_dot_product_attention with a dense mask."""
    n = q.shape[1]
    i, j = torch.arange(n)[:, None], torch.arange(n)[None, :]
    seen = j <= i
    if window >= 0:
        seen = seen & ((j >= i - window) | (j < keep))
    bias = -slopes()[:, None, None] * (i - j).abs()
    bias = bias.masked_fill(~seen, -torch.inf).to(q.dtype)
    q, k, v = (x.repeat_interleave(HEADS // x.shape[2], 2).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None]).transpose(1, 2)


class Block(nn.Module):
    def __init__(self, window: int):
        super().__init__()
        self.window = window
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.qkv = nn.Linear(WIDTH, HEADS * DIM + HEADS_K * DIM + HEADS_V * DIM_V)
        self.project = nn.Linear(HEADS * DIM_V, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x, dense=False, keep=KEEP, cache=None, length=0):
        q, k, v = self.qkv(self.norms[0](x)).split((HEADS * DIM, HEADS_K * DIM, HEADS_V * DIM_V), -1)
        q, k, v = q.unflatten(-1, (HEADS, DIM)), k.unflatten(-1, (HEADS_K, DIM)), v.unflatten(-1, (HEADS_V, DIM_V))
        options = {"causal": True, "window_size": (self.window, 0), "alibi_slopes": slopes(), "keep_first": keep}
        if cache is not None:
            out = strobe.flash_attn_with_kvcache(q, *cache, k, v, cache_seqlens=length, **options)
        elif dense:
            out = dense_attention(q, k, v, self.window, keep)
        else:
            out = strobe.flash_attn_func(q, k, v, **options)
        x = x + self.project(out.flatten(-2))
        return x + self.mlp(self.norms[1](x))


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(256, WIDTH)
        self.blocks = nn.ModuleList(Block(WINDOW if n % 2 == 0 else -1) for n in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        nn.init.normal_(self.embed.weight, std=0.02)

    def forward(self, tokens, caches=None, length=0, **options):
        x = self.embed(tokens)
        for n, block in enumerate(self.blocks):
            x = block(x, cache=caches and caches[n], length=length, **options)
        return self.norm(x) @ self.embed.weight.T


def loss_of(model, batch, **options):
    logits = model(batch[:, :-1], **options)
    return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


def check_against_dense(model, batch):
    gradients = []
    for dense in (False, True):
        model.zero_grad()
        loss = loss_of(model, batch, dense=dense)
        loss.backward()
        gradients.append((loss.item(), [p.grad.clone() for p in model.parameters()]))
    (ours, a), (theirs, b) = gradients
    worst = max(((x - y).norm() / y.norm().clamp_min(1e-12)).item() for x, y in zip(a, b, strict=True))
    print(
        f"one step against scaled_dot_product_attention: loss {ours:.6f} / {theirs:.6f}, gradients within {worst:.1e}"
    )
    if abs(ours - theirs) > 1e-4 or worst > 1e-3:
        raise SystemExit("the two differ")


@torch.no_grad()
def generate(model, prompt: bytes, count: int) -> bytes:
    tokens = list(prompt)
    capacity = len(tokens) + count
    caches = [(torch.empty(1, capacity, HEADS_K, DIM), torch.empty(1, capacity, HEADS_V, DIM_V)) for _ in range(LAYERS)]
    logits, length, worst = model(torch.tensor([tokens]), caches), len(tokens), 0.0
    for step in range(count):
        if step % 32 == 0:
            worst = max(worst, (logits[0, -1] - model(torch.tensor([tokens]))[0, -1]).abs().max().item())
        tokens.append(torch.multinomial((logits[0, -1] / 0.7).softmax(-1), 1).item())
        logits = model(torch.tensor([tokens[-1:]]), caches, length)
        length += 1
    print(f"cached against uncached logits: largest difference {worst:.1e}")
    if worst > 1e-3:
        raise SystemExit("the cache changes the logits")
    return bytes(tokens)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400)
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    text = torch.tensor(list("\n".join(topics.topics.values()).encode()))
    train, held_out = text[: -len(text) // 10], text[-len(text) // 10 :]
    print(f"strobe {strobe.__version__} on {strobe.cpu_isa()}, {len(text):,} bytes of text")
    model = GPT()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)

    def batch(size=8, length=CONTEXT):
        starts = torch.randint(0, len(train) - length - 1, (size,))
        return torch.stack([train[s : s + length + 1] for s in starts])

    check_against_dense(model, batch())
    begin = time.perf_counter()
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        loss = loss_of(model, batch())
        loss.backward()
        optimizer.step()
        if step % 50 == 0 or step == steps:
            rate = step * 8 * CONTEXT / (time.perf_counter() - begin)
            print(f"step {step:4d}  loss {loss.item():.3f}  {rate:,.0f} bytes/s", flush=True)
    print("bits per byte on held-out text:")
    with torch.no_grad():
        for factor in (1, 4, 16):
            piece = held_out[: CONTEXT * factor + 1][None]
            bits = [loss_of(model, piece, keep=keep).item() / math.log(2) for keep in (KEEP, 0)]
            print(f"  context {CONTEXT * factor:5d}: window + kept tokens {bits[0]:.3f}, window only {bits[1]:.3f}")
    print(generate(model, b"The class statement ", 300).decode(errors="replace"))


if __name__ == "__main__":
    main()
