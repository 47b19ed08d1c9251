"""flash_attn.bert_padding in plain PyTorch: between padded batches [batch, seqlen, ...] and rows [total, ...]."""

import torch
from torch import Tensor

__all__ = [
    "index_first_axis",
    "index_first_axis_residual",
    "index_put_first_axis",
    "pad_input",
    "unpad_input",
    "unpad_input_for_concatenated_sequences",
]


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """Rows `indices` of the first axis."""
    return input.index_select(0, indices)


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """A tensor of `first_axis_dim` rows: `values` at `indices`, 0 elsewhere."""
    return values.new_zeros((first_axis_dim, *values.shape[1:])).index_copy(0, indices, values)


def index_first_axis_residual(input: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """(the rows, input without its history)."""
    return index_first_axis(input, indices), input.detach()


def _pack(hidden_states: Tensor, mask: Tensor, seqlens: Tensor):
    indices = mask.flatten().nonzero().flatten()
    cu_seqlens = torch.nn.functional.pad(seqlens.cumsum(0, dtype=torch.int32), (1, 0))
    rows = index_first_axis(hidden_states.flatten(0, 1), indices)
    return rows, indices, cu_seqlens, int(seqlens.max()) if seqlens.numel() else 0


def unpad_input(hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None):
    """(rows [total, ...], indices, cu_seqlens int32 [batch + 1], max_seqlen, seqused [batch]).

    Args:
        hidden_states: [batch, seqlen, ...].
        attention_mask: [batch, seqlen], 1 for a token.
        unused_mask: [batch, seqlen], 1 for a place to allocate that holds no token; seqused does not count it.
    """
    held = attention_mask if unused_mask is None else attention_mask + unused_mask
    packed = _pack(hidden_states, held, held.sum(-1, dtype=torch.int32))
    return *packed, attention_mask.sum(-1, dtype=torch.int32)


def unpad_input_for_concatenated_sequences(hidden_states: Tensor, attention_mask_in_length: Tensor):
    """(rows, indices, cu_seqlens, max_seqlen) where row b of the mask lists the lengths of the sequences in row b."""
    lengths = attention_mask_in_length
    places = torch.arange(lengths.shape[-1], device=lengths.device)
    return _pack(hidden_states, places < lengths.sum(-1, keepdim=True), lengths[lengths > 0].int())


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """Rows [total, ...] back in their places of [batch, seqlen, ...]."""
    return index_put_first_axis(hidden_states, indices, batch * seqlen).unflatten(0, (batch, seqlen))
