"""Real English prose that ships with CPython: the language reference, as bytes."""

from pydoc_data import topics

import torch

BYTES = 256  # a token is a byte


def load() -> tuple[torch.Tensor, torch.Tensor]:
    """(train, held out), the last tenth held out. A paragraph that several topics share is kept once, so that nothing
    held out was trained on."""
    seen, parts = set(), []
    for topic in topics.topics.values():
        new = [p for p in topic.split("\n\n") if p not in seen]
        seen.update(new)
        parts.append("\n\n".join(new))
    text = torch.tensor(list("\n\n\n".join(parts).encode()))
    cut = len(text) * 9 // 10
    return text[:cut], text[cut:]


def batches(text: torch.Tensor, context: int, size: int, seed: int):
    """Endless random batches [size, context + 1], the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(text) - context, (size,), generator=generator)
        yield torch.stack([text[s : s + context + 1] for s in starts])


def show(tokens) -> str:
    """The bytes as text that is safe to print."""
    decoded = bytes(tokens).decode(errors="replace")
    return "".join(c if c.isprintable() or c == "\n" else "·" for c in decoded)
