"""Packed sequences that do not fill their tensors (padded CUDA graphs): FlashAttention leaves rows behind the last
sequence as they were in memory; here they give 0, as one more sequence that sees no key."""

import torch
from torch import Tensor

_PER_SEQUENCE = {"leftpad_k": 1, "full_from": 1, "seqused_q": 1, "block_table": 2, "page_table": 2, "alibi_slopes": 2}


def with_tail(call: dict) -> dict | None:
    """The arguments of flash_attn_varlen_func that do the same as `call`'s, of any packed function.

    None where no row is left over, or where only a copy from the device could tell.
    """
    for name, width in (("qkv", 3), ("kv", 2), ("q", None), ("k", None)):
        x = call.get(name)
        if name in call and not (isinstance(x, Tensor) and x.dim() >= 3 and width in (None, x.shape[1])):
            return None
    call = _unpacked(dict(call))
    cu_q, cu_k, q, k = call["cu_seqlens_q"], call["cu_seqlens_k"], call["q"], call["k"]
    if not isinstance(cu_q, Tensor) or cu_q.is_cuda or cu_q.dim() != 1 or not cu_q.numel():
        return None
    if not isinstance(cu_k, Tensor) and not isinstance(call.get("seqused_k"), Tensor):
        return None
    paged = call.get("block_table") is not None or call.get("page_table") is not None
    spare_q = q.shape[0] - int(cu_q[-1])
    spare_k = 0 if paged or not isinstance(cu_k, Tensor) else k.shape[0] - int(cu_k[-1])
    if spare_q < 0 or spare_k < 0 or spare_q + spare_k == 0:
        return None
    call["cu_seqlens_q"] = torch.cat([cu_q, cu_q.new_tensor([q.shape[0]])])
    call["max_seqlen_q"] = max(int(call["max_seqlen_q"]), spare_q)
    used = call.get("seqused_k")
    if isinstance(cu_k, Tensor):
        used = cu_k.diff() if used is None else used
        call["cu_seqlens_k"] = torch.cat([cu_k, cu_k[-1:] + spare_k])
        call["max_seqlen_k"] = max(int(call["max_seqlen_k"]), spare_k)
    call["seqused_k"] = _one_more(used)
    for name, dims in _PER_SEQUENCE.items():
        value = call.get(name)
        if isinstance(value, Tensor) and value.dim() == dims:
            call[name] = _one_more(value, spare_q if name == "seqused_q" else 0)
    return call


def without_tail(probs: Tensor, call: dict) -> Tensor:
    """S_dmask of a call with the added sequence, as that of `call` without it."""
    longest = [call.get(n, call.get("max_seqlen")) for n in ("max_seqlen_q", "max_seqlen_k")]
    rows, cols = (-(-int(n) // 128) * 128 for n in longest)
    return probs[:-1, :, :rows, :cols]


def _unpacked(call: dict) -> dict:
    if "qkv" in call:
        call["q"], call["k"], call["v"] = call.pop("qkv").unbind(1)
        call["cu_seqlens_q"] = call["cu_seqlens_k"] = call.pop("cu_seqlens")
        call["max_seqlen_q"] = call["max_seqlen_k"] = call.pop("max_seqlen")
    elif "kv" in call:
        call["k"], call["v"] = call.pop("kv").unbind(1)
    return call


def _one_more(x: Tensor, value=0) -> Tensor:
    return torch.cat([x, torch.full_like(x[:1], value)])
