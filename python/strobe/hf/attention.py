"""The attention function of attn_implementation="strobe"."""

import torch
from torch import Tensor
from transformers.utils import logging

from strobe._arguments import autocast, last_contiguous, options, sinks_of
from strobe._attend import attend
from strobe._extension import Side
from strobe.hf import masks, settings
from strobe.hf.dense import dense_attention
from strobe.hf.paged import paged_attention
from strobe.interface import flash_attn_func
from strobe.varlen import flash_attn_varlen_func

logger = logging.get_logger(__name__)
_NAME = 'attn_implementation="strobe"'
# What models pass to change the attention itself: added scores, and sparse indexers' choice of keys.
_REFUSED = ("position_bias", "indices", "block_indices", "sinks")


def attention(
    module,
    query,
    key,
    value,
    attention_mask,
    dropout=0.0,
    scaling=None,
    sliding_window=None,
    softcap=None,
    is_causal=None,
    s_aux=None,
    cache=None,
    full_from=None,
    position_ids=None,
    cu_seq_lens_q=None,
    cu_seq_lens_k=None,
    max_length_q=None,
    max_length_k=None,
    **kwargs,
):
    """Transformers' attention interface: [batch, heads, rows, dim] tensors; (out [batch, rows, heads, dim], None).

    full_from: int or int [batch], a keyword of the model's forward: queries from this column of the batch on have no
    window, in the layers with force_fa_decode. With packed sequences: row of each sequence.
    """
    for name in _REFUSED:
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"{_NAME}: {name}; load {type(module).__name__}'s model with sdpa or eager")
    if kwargs.get("output_attentions"):
        logger.warning_once(f'{_NAME} returns no attention weights; use "eager" for output_attentions')
    query, key, value = _in_model_dtype(module, query, key, value)
    layer = settings.of_module(module)
    common = dict(softmax_scale=scaling, softcap=softcap or 0.0)
    if cache is not None:
        kwargs |= dict(cu_seq_lens_q=cu_seq_lens_q, cu_seq_lens_k=cu_seq_lens_k)
        kwargs |= dict(max_length_q=max_length_q, max_length_k=max_length_k)
        return paged_attention(module, query, key, value, cache, sliding_window, layer, s_aux, common, kwargs), None

    layout = None
    if attention_mask is not None:
        layout = masks.Layout.unpack(attention_mask)
        if layout is None and attention_mask.dim() == 4:
            if layer.window is not None and sliding_window is None:
                raise NotImplementedError(
                    f"{_NAME}: a 4-D mask beside the window of config.strobe (layer {module.layer_idx}); "
                    "put the window into the mask, or the layer into full_layers"
                )
            out = dense_attention(
                query, key, value, attention_mask, scale=scaling, softcap=softcap, s_aux=s_aux, dropout=dropout
            )
            return out, None
        if layout is None and attention_mask.dim() != 2:
            raise NotImplementedError(f"{_NAME}: an attention mask of shape {list(attention_mask.shape)}")
    if layout is None:
        is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        if attention_mask is not None:
            layout = masks.of_padding(attention_mask[:, : key.shape[2]], query.shape[2], is_causal)
    elif is_causal is None or layout.kind == masks.BIDIRECTIONAL:
        is_causal = layout.kind != masks.BIDIRECTIONAL
    nothing_padded = layout is None or layout.numbers.shape[1] == 0
    if nothing_padded and is_causal and query.shape[2] == key.shape[2] and position_ids is not None:
        packed = masks.of_positions(position_ids, query.shape[0], query.shape[2])
        if packed is not None:
            layout = packed._replace(window=layout.window if layout is not None else None)

    own = layout.window if layout is not None and layout.window is not None else sliding_window
    if own is not None:  # a layer that slides by itself: its cache has dropped what is left of its window
        layer = settings.NOTHING
        common["window_size"] = (own - 1, 0 if is_causal else own - 1)
    elif layer.window is not None and is_causal:
        common |= dict(window_size=(layer.window - 1, 0), keep_first=layer.keep_first)
        common |= dict(force_fa_decode=layer.force_fa_decode)
    common |= dict(causal=is_causal, dropout_p=dropout)
    if not layer.force_fa_decode:
        full_from = None

    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if cu_seq_lens_q is not None and cu_seq_lens_k is not None:
        out = _varlen(
            q,
            k,
            v,
            cu_seq_lens_q,
            cu_seq_lens_k,
            max_length_q,
            max_length_k,
            s_aux=s_aux,
            full_from=full_from,
            **common,
        )
    elif layout is not None and layout.kind == masks.PACKED:
        cu_seqlens, longest = layout.numbers[0], layout.longest or q.shape[1]
        out = _varlen(q, k, v, cu_seqlens, cu_seqlens, longest, longest, s_aux=s_aux, full_from=full_from, **common)
    elif layout is None or layout.numbers.shape[1] == 0:
        full_from = _rows(full_from, k.shape[1] - q.shape[1], q)
        _say_if_unclear(layer, full_from, q, k.shape[1])
        out = flash_attn_func(q, k, v, s_aux=s_aux, full_from=full_from, **common)
    else:
        out = _padded(q, k, v, layout.numbers, s_aux, full_from, common)
    return out, None


def _varlen(q, k, v, cu_q, cu_k, max_q, max_k, **common):
    packed = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
    cu_q, cu_k = (cu.to(torch.int32) for cu in (cu_q, cu_k))
    return flash_attn_varlen_func(*packed, cu_q, cu_k, max_q, max_k, **common).view(*q.shape[:-1], v.shape[-1])


def _padded(q, k, v, numbers, s_aux, full_from, common):
    """Sequences of one batch that begin and end at columns of their own, without a copy."""
    numbers = numbers.contiguous()
    if numbers.shape[1] == 2:
        first, end = numbers.unbind(1)
        full_from = _rows(full_from, end - q.shape[1], q)
        side = Side(seqused_k=end.contiguous(), leftpad_k=first.contiguous(), full_from=full_from)
    else:
        if full_from is not None:
            raise NotImplementedError(f"{_NAME}: full_from with padding between tokens")
        tokens, rows, order = numbers[:, 0], numbers[:, 1], numbers[:, 2:].long()
        k, v = (x.gather(1, order[:, :, None, None].expand(-1, -1, *x.shape[2:])) for x in (k, v))
        side = Side(seqused_q=rows.contiguous(), seqused_k=tokens.contiguous())
    call = dict(window_size=(-1, -1), keep_first=0, force_fa_decode=False) | common
    q, k, v = map(last_contiguous, autocast(q, k, v))
    return attend(q, k, v, sinks_of(s_aux), side, options(_NAME, backend=None, **call))


def _rows(full_from, offset, q):
    """full_from counted in the batch's columns, as int32 [batch] of the call's rows: row i is column offset + i."""
    if full_from is None:
        return None
    if not isinstance(full_from, Tensor):
        full_from = torch.full((q.shape[0],), full_from, device=q.device)
    if full_from.shape != q.shape[:1]:
        raise ValueError(f"{_NAME}: full_from has shape {list(full_from.shape)}, the batch is {q.shape[0]}")
    return (full_from.to(q.device) - offset).clamp(min=0).to(torch.int32)


def _say_if_unclear(layer, full_from, q, columns):
    if layer.force_fa_decode and full_from is None and 1 < q.shape[1] < columns and not torch.compiler.is_compiling():
        logger.warning_once(
            f"{_NAME}: several queries beside a filled cache take the window, as a prefill does. Are they decoding "
            "(assisted decoding)? Then pass full_from=<length of the prompt> to generate()."
        )


def _in_model_dtype(module, *tensors):
    """float32 that a norm or adapter left on a GPU, in the dtype of the model, as Transformers does for flash."""
    query = tensors[0]
    if query.dtype != torch.float32 or not query.is_cuda or torch.is_autocast_enabled("cuda"):
        return tensors
    linear = next((m for m in module.modules() if isinstance(m, torch.nn.Linear)), None)
    quantized = hasattr(getattr(module, "config", None), "_is_quantized")
    dtype = module.config.dtype if quantized or linear is None else linear.weight.dtype
    return tuple(t.to(dtype) for t in tensors)
