"""What the drop-ins refuse, and how: in words that name the argument."""

import torch
from torch import Tensor

INF = float("inf")


def refuse(function: str, **given):
    """NotImplementedError for the first argument that is given."""
    for name, value in given.items():
        if value is not None and value is not False:
            raise NotImplementedError(f"{function}: {name} is not implemented")


def no_float8(function: str, **given):
    """FP8 tensors, and the factors that only they have."""
    for name, value in given.items():
        if isinstance(value, Tensor) and (name.endswith("_descale") or value.dtype.itemsize == 1):
            raise NotImplementedError(f"{function}: FP8 is not implemented, {name} is given as {value.dtype}")
        if name.endswith("_descale") and value is not None:
            raise NotImplementedError(f"{function}: FP8 is not implemented, {name} is given")


def no_generator(function: str, generator):
    if generator is not None:
        raise NotImplementedError(
            f"{function}: `generator` argument is no longer supported and must be None; seed torch's default generator"
        )


def hints(function: str, *, num_splits=0, pack_gqa=None, sm_margin=0, scheduler_metadata=None):
    """Wishes about speed. Strobe plans by itself, always alike; their types are checked."""
    for name, value in (("num_splits", num_splits), ("sm_margin", sm_margin)):
        if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
            raise TypeError(f"{function}: {name} is {value!r}, it takes an integer")
    if sm_margin < 0:
        raise ValueError(f"{function}: sm_margin is {sm_margin}, allowed is at least 0")
    if pack_gqa is not None and not isinstance(pack_gqa, bool):
        raise TypeError(f"{function}: pack_gqa is {pack_gqa!r}, it takes True, False or None")
    if scheduler_metadata is not None and (
        not isinstance(scheduler_metadata, Tensor) or scheduler_metadata.dtype != torch.int32
    ):
        raise TypeError(f"{function}: scheduler_metadata takes the int32 tensor of get_scheduler_metadata")


def lse_of_fa3(lse: Tensor) -> Tensor:
    """An empty row has LSE -inf in FlashAttention 3; everywhere, also where the whole call has no keys."""
    return lse.masked_fill(lse == INF, -INF)


def lse_of_fa2(lse: Tensor) -> Tensor:
    """An empty row has LSE +inf in FlashAttention 2, which is what the core's backward knows."""
    return lse.masked_fill(lse == -INF, INF)
