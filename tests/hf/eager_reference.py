"""Eager attention in which every layer has the 4-D mask that its window, kept tokens and full rows amount to."""

from dataclasses import dataclass, field

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask


@dataclass
class Expected:
    """layers: (window, keep_first, full_rows) of each; padding [batch, columns]; answer [batch]: the first column of
    the rows that see everything in layers with full_rows."""

    layers: list
    padding: torch.Tensor
    answer: torch.Tensor | None = None
    calls: list = field(default_factory=list)

    def visible(self, layer_idx: int, rows: int) -> torch.Tensor:
        window, keep_first, full_rows = self.layers[layer_idx]
        real = self.padding[:, :rows].bool()
        place = real.cumsum(1) - 1  # among the tokens; padding does not count
        i, j = place[:, :, None], place[:, None, :]
        column = torch.arange(rows)
        seen = (column[:, None] >= column[None, :]) & real[:, None, :]
        if window is None:
            return seen
        near = (j > i - window) | (j < keep_first)
        if full_rows and self.answer is not None:
            near = near | (column[None, :] >= self.answer[:, None])[:, :, None]
        return seen & near


_expected: Expected | None = None


def _attention(module, query, key, value, attention_mask, scaling=None, softcap=None, **kwargs):
    rows = query.shape[2]
    assert rows == key.shape[2], "the reference takes whole sequences"
    _expected.calls.append(module.layer_idx)
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    scores = query @ key.mT * scaling
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    seen = _expected.visible(module.layer_idx, rows)[:, None]
    scores = (scores + attention_mask).masked_fill(~seen, torch.finfo(scores.dtype).min)
    return (scores.softmax(-1) @ value).transpose(1, 2), None


def run(model, expected: Expected, **call):
    """The model's output under `expected`."""
    global _expected
    AttentionInterface.register("reference_eager", _attention)
    AttentionMaskInterface.register("reference_eager", eager_mask)
    before, _expected = model.config._attn_implementation, expected
    model.set_attn_implementation("reference_eager")
    try:
        return model(**call, use_cache=False)
    finally:
        assert expected.calls, "the reference was not called"
        model.set_attn_implementation(before)
        _expected = None
