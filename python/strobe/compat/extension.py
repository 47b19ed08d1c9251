"""The functions of flash_attn_2_cuda: positional only; the number of arguments tells whose interface a call speaks."""

import torch

import strobe
from strobe.compat import raw
from strobe.compat.arguments import hints, no_generator

# FlashAttention 2.8.3 (2.8.4 adds num_splits to varlen_fwd) and flash-attention-SWAA (keep_first, force_fa_decode).
_FWD = "q k v out alibi_slopes p_dropout softmax_scale is_causal window_left window_right softcap".split()
_VARLEN_FWD = (
    "q k v out cu_seqlens_q cu_seqlens_k seqused_k leftpad_k block_table alibi_slopes max_seqlen_q max_seqlen_k "
    "p_dropout softmax_scale zero_tensors is_causal window_left window_right softcap"
).split()
_BWD = (
    "dout q k v out lse dq dk dv alibi_slopes p_dropout softmax_scale is_causal window_left window_right softcap"
).split()
_VARLEN_BWD = (
    "dout q k v out lse dq dk dv cu_seqlens_q cu_seqlens_k alibi_slopes max_seqlen_q max_seqlen_k p_dropout "
    "softmax_scale zero_tensors is_causal window_left window_right softcap"
).split()
_KVCACHE = (
    "q k_cache v_cache k v cache_seqlens rotary_cos rotary_sin cache_batch_idx cache_leftpad block_table alibi_slopes "
    "out softmax_scale is_causal window_left window_right softcap"
).split()
_KEPT = ["keep_first", "force_fa_decode"]


def _orders(head: list, tail: str, *more: str) -> dict:
    """Names by arity: FlashAttention's, with more at the end, and SWAA's."""
    tail = tail.split()
    orders = [head + tail, head + tail + list(more), head + _KEPT + tail]
    return {len(names): names for names in orders}


ORDERS = {
    "fwd": _orders(_FWD, "return_softmax generator"),
    "varlen_fwd": _orders(_VARLEN_FWD, "return_softmax generator", "num_splits"),
    "bwd": _orders(_BWD, "deterministic generator rng_state"),
    "varlen_bwd": _orders(_VARLEN_BWD, "deterministic generator rng_state"),
    "fwd_kvcache": _orders(_KVCACHE, "rotary_interleaved num_splits"),
}


def _named(function: str, args) -> dict:
    names = ORDERS[function].get(len(args))
    if names is None:
        allowed = ", ".join(f"{n} ({'SWAA' if 'keep_first' in v else 'FlashAttention'})" for n, v in _sorted(function))
        raise TypeError(f"{function}: {len(args)} arguments are given, it takes {allowed}")
    call = dict(zip(names, args, strict=True))
    no_generator(function, call.pop("generator", None))
    hints(function, num_splits=call.pop("num_splits", 0))
    call["window"] = (call.pop("window_left"), call.pop("window_right"))
    call["causal"] = call.pop("is_causal")
    if "p_dropout" in call:
        call["dropout_p"] = call.pop("p_dropout")
    if "block_table" in call:
        call["page_table"] = call.pop("block_table")
    return call


def _sorted(function: str):
    return sorted(ORDERS[function].items())


def fwd(*args):
    """[out, lse, S_dmask, rng_state]"""
    return list(raw.forward("fwd", **_named("fwd", args)))


def varlen_fwd(*args):
    """[out, lse, S_dmask, rng_state]"""
    return list(raw.forward("varlen_fwd", **_named("varlen_fwd", args)))


def bwd(*args):
    """[dq, dk, dv, softmax_d]"""
    return list(raw.backward("bwd", **_named("bwd", args)))


def varlen_bwd(*args):
    """[dq, dk, dv, softmax_d]. zero_tensors has nothing to do: every gradient is written."""
    call = _named("varlen_bwd", args)
    call.pop("zero_tensors")
    return list(raw.backward("varlen_bwd", **call))


def fwd_kvcache(*args):
    """[out, lse]; the caches are written in place."""
    call = _named("fwd_kvcache", args)
    call["window_size"] = call.pop("window")
    with torch.no_grad():
        return list(strobe.flash_attn_with_kvcache(**call, return_softmax_lse=True))


def _varlen_fwd(
    q, k, v, out, cu_seqlens_q, cu_seqlens_k, seqused_k, leftpad_k, block_table, alibi_slopes, max_seqlen_q,
    max_seqlen_k, dropout_p, softmax_scale, zero_tensors, causal, window_size_left, window_size_right, softcap,
    keep_first, force_fa_decode, return_softmax,
):  # fmt: skip
    """SWAA's name for `varlen_fwd` in its Python module: (out, lse, S_dmask, rng_state)."""
    return tuple(varlen_fwd(
        q, k, v, out, cu_seqlens_q, cu_seqlens_k, seqused_k, leftpad_k, block_table, alibi_slopes, max_seqlen_q,
        max_seqlen_k, dropout_p, softmax_scale, zero_tensors, causal, window_size_left, window_size_right, softcap,
        keep_first, force_fa_decode, return_softmax, None,
    ))  # fmt: skip
