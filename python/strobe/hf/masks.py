"""The mask function of attn_implementation="strobe": what Transformers wants masked, in the fewest numbers that say it.

A mask crosses the model as None (causal, nothing padded), as a `Layout`'s tensor, or, where the pattern is none of
Strobe's, as the boolean 4-D mask of the dense route. A Layout's tensor is int32 [batch, numbers, window + 1, kind]:
Transformers hands 4-D masks through untouched, also through a compiled generate(), and what must be known without
reading the tensor (the kind, the window) is in its shape. No tensor has size 1 in dimension 1, so it is no user's mask.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import masking_utils as hf
from transformers.models.auto.modeling_auto import MODEL_MAPPING
from transformers.utils.import_utils import is_tracing

CAUSAL, BIDIRECTIONAL, PACKED = 1, 2, 3


class Layout(NamedTuple):
    """A mask as the attention function reads it."""

    kind: int
    window: int | None  # keys seen, the query's own included
    numbers: Tensor  # int32 [batch, n]; n = 0: nothing padded
    longest: int | None = None  # packed: the longest sequence, where it is known

    def pack(self) -> Tensor:
        size = 1 if self.window is None else self.window + 1
        packed = self.numbers.to(torch.int32)[:, :, None, None].expand(-1, -1, size, self.kind)
        if self.longest is not None:
            packed.strobe_longest = self.longest  # only a hint: a copy of the mask may lose it
        return packed

    @staticmethod
    def unpack(mask) -> "Layout | None":
        """The layout in `mask`, None for a mask that holds none."""
        if mask.dim() != 4 or mask.dtype != torch.int32 or mask.shape[1] == 1:
            return None
        window = mask.shape[2] - 1
        hint = None if torch.compiler.is_compiling() else getattr(mask, "strobe_longest", None)
        return Layout(mask.shape[3], window or None, mask[:, :, 0, 0], hint)


class _Pattern(NamedTuple):
    kind: int
    window: int | None = None
    packed: bool = False


def mask(
    batch_size,
    q_length,
    kv_length,
    q_offset=0,
    kv_offset=0,
    mask_function=hf.causal_mask_function,
    attention_mask=None,
    local_size=None,
    allow_is_causal_skip=True,
    config=None,
    use_vmap=False,
    device="cpu",
    **kwargs,
):
    """Transformers' mask interface."""
    tracing = is_tracing(attention_mask)
    dense = dict(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        allow_is_causal_skip=False,
        use_vmap=use_vmap,
        device=device,
    )
    if use_vmap or not _takes_layouts(type(config)):
        return hf.sdpa_mask(**dense)
    whole = attention_mask is None and isinstance(q_offset, int) and q_offset == 0 and q_length == kv_length
    if tracing:
        pattern = _guessed(mask_function, local_size, config, "allow_is_bidirectional_skip" in kwargs)
        if pattern is not None:
            # In a graph the parts of a mask function are out of reach; it can still be called.
            pattern = pattern._replace(packed=whole and not allow_is_causal_skip)
    else:
        pattern = recognized(mask_function)
    # A model may ask for a mask to compute with. (A compiled decoding step asks for one that is always there.)
    computes = not allow_is_causal_skip and q_length > 1 and "allow_is_bidirectional_skip" not in kwargs
    if pattern is None or (pattern.packed and not whole) or (computes and not pattern.packed):
        return hf.sdpa_mask(**dense)
    if pattern.packed:
        return _packed(pattern, batch_size, q_length, mask_function, device, tracing)
    # Columns that are visible to the last query, and all before it: a static cache is longer.
    used = kv_length if pattern.kind == BIDIRECTIONAL else q_offset + q_length - kv_offset
    if isinstance(used, int) and used > kv_length:
        return hf.sdpa_mask(**dense)
    real = None
    if attention_mask is not None:
        real = F.pad(attention_mask, (0, max(0, kv_offset + kv_length - attention_mask.shape[-1])))
        real = real[:, kv_offset : kv_offset + kv_length].bool()
    layout = _padded(pattern, real, used, batch_size, q_length, kv_length, device, tracing)
    if layout is None:  # padding between tokens
        if not getattr(config, "strobe", None) or pattern.kind == BIDIRECTIONAL:
            return hf.sdpa_mask(**dense)
        layout = _gathered(pattern, real, int(used), q_length)
    if layout.kind == CAUSAL and layout.window is None and layout.numbers.shape[1] == 0:
        return None
    return layout.pack()


@torch.compiler.assume_constant_result
def _takes_layouts(config_class) -> bool:
    """False for models of which Transformers says that they compute with their 4-D masks, or cannot do without."""
    if config_class not in _layouts_taken:
        models = MODEL_MAPPING.get(config_class, ())
        models = models if isinstance(models, (tuple, list)) else (models,)
        _layouts_taken[config_class] = all(model._supports_flash_attn for model in models)
    return _layouts_taken[config_class]


_layouts_taken: dict[type, bool] = {}


def of_padding(real: Tensor, q_length: int, causal: bool) -> Layout:
    """The layout of a 2-D mask, from a model that makes no other."""
    pattern = _Pattern(CAUSAL if causal else BIDIRECTIONAL)
    batch, kv_length = real.shape
    layout = _padded(pattern, real.bool(), kv_length, batch, q_length, kv_length, real.device, is_tracing(real))
    if layout is None:
        raise NotImplementedError("strobe.hf: a 2-D mask with padding between tokens")
    return layout


def of_positions(position_ids: Tensor, batch: int, length: int) -> Layout | None:
    """The layout of sequences packed in rows, where position_ids count every one from 0; None where they do not.

    Transformers makes no mask of it when the model fills a cache, which it does in training unless use_cache=False.
    """
    if length == 1 or position_ids.dim() != 2 or position_ids.shape[1] != length or is_tracing(position_ids):
        return None
    version = None if position_ids.is_inference() else position_ids._version
    known = getattr(position_ids, "strobe_layout", None)
    if known is not None and known[0] == version:  # every layer asks
        return known[1]
    starts = position_ids[:, 1:] != position_ids[:, :-1] + 1
    restarts, jumps = torch.stack([starts.any(), (starts & (position_ids[:, 1:] != 0)).any()]).tolist()
    layout = None
    if restarts and not jumps:
        starts = F.pad(starts, (1, 0), value=True).expand(batch, length)
        layout = _sequences(_Pattern(CAUSAL), starts, False)
    if version is not None:
        position_ids.strobe_layout = (version, layout)
    return layout


def recognized(function) -> _Pattern | None:
    """The pattern of a mask function, None where it is not Strobe's. Reads what Transformers' factories closed over."""
    if function is hf.causal_mask_function:
        return _Pattern(CAUSAL)
    if function is hf.bidirectional_mask_function:
        return _Pattern(BIDIRECTIONAL)
    if getattr(function, "__module__", None) != hf.__name__ or function.__closure__ is None:
        return None
    factory = function.__qualname__.partition(".")[0]
    parts = dict(zip(function.__code__.co_freevars, (cell.cell_contents for cell in function.__closure__), strict=True))
    if factory == "and_masks":
        found = [_part(f) for f in parts["mask_functions"]]
        if None in found:
            return None
        kinds = {p.kind for p in found if p.kind}
        windows = {p.window for p in found if p.window is not None}
        if kinds != {CAUSAL} or len(windows) > 1:
            return None
        return _Pattern(CAUSAL, next(iter(windows), None), any(p.packed for p in found))
    return recognized(parts["mask_function"]) if factory == "remap_positions_for_packed_sequence" else None


def _part(function) -> _Pattern | None:
    """A member of an intersection; kind 0 where it says nothing of causality."""
    factory = getattr(function, "__qualname__", "").partition(".")[0]
    if getattr(function, "__module__", None) == hf.__name__ and function.__closure__:
        if factory == "sliding_window_overlay":
            window = function.__closure__[0].cell_contents
            return _Pattern(0, window) if isinstance(window, int) else None
        if factory == "packed_sequence_mask_function":
            return _Pattern(0, None, True)
    return recognized(function)


def _guessed(function, local_size, config, bidirectional: bool) -> _Pattern | None:
    """`recognized` without looking inside: which of Transformers' functions can have made this one."""
    if function is hf.causal_mask_function:
        return _Pattern(CAUSAL)
    if function is hf.bidirectional_mask_function:
        return _Pattern(BIDIRECTIONAL)
    if bidirectional or not function.__qualname__.startswith("and_masks."):
        return None
    if local_size is None:
        return _Pattern(CAUSAL)
    if local_size != getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None):
        return None
    return _Pattern(CAUSAL, local_size)


def _padded(pattern, real, used, batch, q_length, kv_length, device, tracing) -> Layout | None:
    """numbers = (first real column, end) for every sequence. None: padding between tokens."""
    nothing = Layout(pattern.kind, pattern.window, torch.empty(batch, 0, dtype=torch.int32, device=device))
    exact = isinstance(used, int) and used == kv_length
    if real is None:
        if exact:
            return nothing
        first, end = torch.zeros(batch, dtype=torch.int32, device=device), used
    else:
        columns = torch.arange(kv_length, device=device)
        real = real & (columns < used)
        count = real.sum(-1)
        first = real.int().argmax(-1)
        last = kv_length - 1 - real.flip(-1).int().argmax(-1)
        solid = ((last - first + 1 == count) | (count == 0)).all()
        first = first * (count > 0)
        if tracing:
            # A graph cannot choose by values: it takes the common case and stops where it is not.
            torch._assert_async(solid, "strobe.hf: padding between tokens in a compiled forward")
        else:
            every, solid, left = torch.stack([real.all(), solid, first.any()]).tolist()
            if not solid:
                return None
            # Padding on the right needs nothing where attention is causal: no token looks at it.
            if exact and (every or (pattern.kind == CAUSAL and not left)):
                return nothing
        end = used if pattern.kind == CAUSAL else torch.where(count > 0, last + 1, kv_length)
    end = end if isinstance(end, Tensor) else torch.full((batch,), end, device=device)
    numbers = torch.stack([first.to(torch.int32), end.to(torch.int32).expand(batch)], 1)
    return Layout(pattern.kind, pattern.window, numbers)


def _gathered(pattern, real, used: int, q_length: int) -> Layout:
    """numbers = (tokens, rows up to the last token, columns with the tokens first): padding between tokens."""
    real = real & (torch.arange(real.shape[1], device=real.device) < used)
    rows = real[:, used - q_length : used]
    count, first = rows.sum(-1), rows.int().argmax(-1)
    end = torch.where(count > 0, q_length - rows.flip(-1).int().argmax(-1), 0)
    if bool(((end - first != count) & (count > 0)).any()):
        raise NotImplementedError(
            "strobe.hf: padding between the tokens of one forward, in a model with config.strobe; pad left or right"
        )
    order = torch.argsort(~real, dim=-1, stable=True)
    return Layout(pattern.kind, pattern.window, torch.cat([real.sum(-1, keepdim=True), end[:, None], order], 1))


def _packed(pattern, batch, length, mask_function, device, tracing) -> Tensor:
    """numbers = cu_seqlens of all rows, one after the other, as one row."""
    rows = torch.arange(batch, device=device)[:, None]
    at = torch.arange(1, length, device=device)[None, :]
    # A sequence starts where a token does not see the one before it.
    goes_on = mask_function(rows, torch.zeros_like(rows), at, at - 1).expand(batch, length - 1)
    return _sequences(pattern, F.pad(~goes_on, (1, 0), value=True), tracing).pack()


def _sequences(pattern, start: Tensor, tracing: bool) -> Layout:
    """start [batch, length]: a sequence begins here."""
    total = start.numel()
    places = torch.arange(total, device=start.device)
    if tracing:  # no size may depend on values: the sequences that are not there are empty ones at the end
        starts, longest = torch.where(start.flatten(), places, total).sort().values, None
    else:
        starts = places[start.flatten()]
        longest = int(torch.diff(starts, append=starts.new_tensor([total])).max())
    cu_seqlens = torch.cat([starts, starts.new_full((1,), total)])
    return Layout(PACKED, pattern.window, cu_seqlens[None], longest)
