"""Strobe as torch's own flash attention on CUDA: scaled_dot_product_attention and varlen_attn, forward and backward.

`activate()` registers with torch.nn.attention's registry of flash implementations. Which backend serves a call of
scaled_dot_product_attention stays torch's choice; where it chooses flash, Strobe runs.
"""

import torch
from torch.library import Library

from strobe._arguments import last_contiguous
from strobe._extension import Options, Side, run_backward, run_forward

NAME = "Strobe"


def activate() -> None:
    """Makes Strobe the flash implementation of this process, in place of any other."""
    registry = _registry()
    registry.register_flash_attention_impl(NAME, register_fn=_override)
    registry.activate_flash_attention_impl(NAME)


def deactivate() -> None:
    """Gives torch its own back; nothing happens where Strobe is not active."""
    if active():
        _registry().restore_flash_attention_impl()


def active() -> bool:
    return _registry().current_flash_attention_impl() == NAME


def _registry():
    from torch.nn import attention

    if not hasattr(attention, "current_flash_attention_impl"):
        raise RuntimeError(
            f"strobe.torch_sdpa: torch {torch.__version__} has no registry of flash implementations, torch 2.11 has; "
            "call strobe.flash_attn_func instead of scaled_dot_product_attention"
        )
    return attention


class _Handle:
    """Torch's registry keeps it while Strobe is active; the operators are torch's again when the library is gone."""

    def __init__(self, library: Library):
        self._library = library

    def remove(self) -> None:
        self._library = None


def _override() -> _Handle:
    library = Library("aten", "IMPL", "CUDA")
    for name, kernel in KERNELS.items():
        if hasattr(torch.ops.aten, name):  # the one in place came with torch 2.12
            library.impl(name, kernel, "CUDA")
    return _Handle(library)


def _options(function, max_q, max_k, dropout_p, is_causal, scale, left=None, right=None) -> Options:
    window = tuple(-1 if bound is None else bound for bound in (left, right))
    return Options(function, max_q, max_k, scale, 0.0, dropout_p, is_causal, window)


def _forward(q, k, v, side, options, out=None):
    """(out, lse, rng_state) of [batch, rows, heads, dim] or packed tensors."""
    q, k, v = map(last_contiguous, (q, k, v))
    rng_state = torch.zeros(2, dtype=torch.uint64, device=q.device)
    if options.dropout_p > 0:
        drawn = torch.randint(0, 2**62, (2,), device="cpu")
        options, rng_state = options.seeded(drawn), drawn.to(torch.uint64).to(q.device)
    # Torch's tracing takes the output to be laid out as the query is.
    out = torch.empty_like(q) if out is None else out
    out, lse = run_forward(q, k, v, None, side, options, out)
    return out, lse, rng_state


def _backward(dout, q, k, v, out, lse, rng_state, side, options):
    if options.dropout_p > 0:
        options = options.seeded(rng_state.to("cpu").to(torch.int64))
    dout, q, k, v, out = map(last_contiguous, (dout, q, k, v, out))
    return run_backward(dout, None, q, k, v, out, lse, None, side, options)[:3]


def _no_debug_mask(function, return_debug_mask, dropout_p):
    if return_debug_mask and dropout_p > 0:
        raise NotImplementedError(f"{function}: return_debug_mask with dropout; strobe.flash_attn_func returns S_dmask")


def _square(function, is_causal, q, k):
    # Torch counts the causal diagonal from the first key here, and asks other backends where that makes a difference.
    if is_causal and q.shape[2] != k.shape[2]:
        raise ValueError(f"{function}: is_causal with {q.shape[2]} queries and {k.shape[2]} keys")


def _rest(query):
    """What torch's own kernels return beside the output, without a meaning here: philox_offset, debug_attn_mask."""
    return torch.zeros((), dtype=torch.uint64, device=query.device), query.new_empty(0)


def sdpa_forward(query, key, value, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None):
    function = "_scaled_dot_product_flash_attention"
    _no_debug_mask(function, return_debug_mask, dropout_p)
    _square(function, is_causal, query, key)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    options = _options(function, -1, -1, dropout_p, is_causal, scale)
    out, lse, rng_state = _forward(q, k, v, Side(), options)
    return out.transpose(1, 2), lse, None, None, query.shape[2], key.shape[2], rng_state, *_rest(query)


def sdpa_backward(
    grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, philox_seed,
    philox_offset, *, scale=None,
):  # fmt: skip
    function = "_scaled_dot_product_flash_attention_backward"
    options = _options(function, -1, -1, dropout_p, is_causal, scale)
    tensors = (x.transpose(1, 2) for x in (grad_out, query, key, value, out))
    gradients = _backward(*tensors, logsumexp, philox_seed, Side(), options)
    return tuple(x.transpose(1, 2) for x in gradients)


def forward(
    query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *, scale=None,
    window_size_left=None, window_size_right=None, seqused_k=None, alibi_slopes=None, block_table=None,
    num_splits=None, out=None,
):  # fmt: skip
    """[batch, rows, heads, dim], or with cum_seq_q packed tensors. num_splits: results have the same bits anyway."""
    function = "_flash_attention_forward"
    _no_debug_mask(function, return_debug_mask, dropout_p)
    if cum_seq_q is not None and cum_seq_k is None and block_table is None:
        raise NotImplementedError(f"{function}: cum_seq_q without cum_seq_k; give both")
    packed = cum_seq_q is not None
    lengths = (max_q, max_k) if packed else (-1, -1)
    options = _options(function, *lengths, dropout_p, is_causal, scale, window_size_left, window_size_right)
    side = Side(
        cu_seqlens_q=cum_seq_q, cu_seqlens_k=None if block_table is not None else cum_seq_k, seqused_k=seqused_k,
        page_table=block_table, alibi_slopes=alibi_slopes,
    )  # fmt: skip
    out, lse, rng_state = _forward(query, key, value, side, options, out)
    return out, lse, rng_state, *_rest(query)


def forward_in_place(out, *arguments, **options):
    return forward(*arguments, **options, out=out)[1]


def backward(
    grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, rng_state,
    unused, *, scale=None, window_size_left=None, window_size_right=None,
):  # fmt: skip
    lengths = (-1, -1) if cum_seq_q is None else (max_q, max_k)
    window = (window_size_left, window_size_right)
    options = _options("_flash_attention_backward", *lengths, dropout_p, is_causal, scale, *window)
    side = Side(cu_seqlens_q=cum_seq_q, cu_seqlens_k=cum_seq_k)
    return _backward(grad_out, query, key, value, out, logsumexp, rng_state, side, options)


KERNELS = {
    "_flash_attention_forward": forward,
    "_flash_attention_forward_no_dropout_inplace": forward_in_place,
    "_flash_attention_backward": backward,
    "_scaled_dot_product_flash_attention": sdpa_forward,
    "_scaled_dot_product_flash_attention_backward": sdpa_backward,
}
