"""attention_chunk: a query sees the keys of its own chunk only, so every chunk is a sequence of its own."""

import torch
from torch import Tensor


def in_chunks(function: str, chunk: int, q, k, v, packed: dict, options: dict):
    """(packed, k, v, options) of a call with one sequence per chunk. Reads the lengths.

    Query i of a sequence stands at p = i + seqlen_k - seqlen_q and sees keys floor(p / chunk) * chunk and on, chunk
    many. The rows of one chunk are neighbours and end where its keys end, so masks stay aligned at the bottom right.
    """
    if chunk < 0:
        raise ValueError(f"{function}: attention_chunk is {chunk}, allowed is at least 0")
    for name in ("keep_first", "force_fa_decode", "full_from"):
        if options.get(name) not in (None, 0, False):
            raise NotImplementedError(f"{function}: {name} with attention_chunk is not implemented")
    cu_q = packed["cu_seqlens_q"].tolist()
    batch = len(cu_q) - 1
    table, cu_k = packed["page_table"], packed["cu_seqlens_k"]
    starts = [0] * batch if cu_k is None else cu_k.tolist()
    used = _list(packed["seqused_k"]) or [b - a for a, b in zip(starts, starts[1:], strict=False)]
    pads = _list(packed["leftpad_k"]) or [0] * batch
    used_q = _list(packed["seqused_q"]) or [b - a for a, b in zip(cu_q, cu_q[1:], strict=False)]
    pieces = [(0, 0, 0, 0)]  # (rows of q, first key, end of keys, sequence); offsets begin with 0
    last = 0  # where the keys of the piece before end
    for b in range(batch):
        first, rows = starts[b] + pads[b], used_q[b]
        seqlen_k = used[b] - pads[b]
        off = seqlen_k - rows
        i = 0
        while i < rows:
            base = (i + off) // chunk * chunk
            n = min(base + chunk - off, rows) - i
            begin, end = (first + base, first + min(base + chunk, seqlen_k)) if base >= 0 else (first, first)
            pieces.append((n, begin, end, b))
            i, last = i + n, end
        pieces.append((cu_q[b + 1] - cu_q[b] - rows, last, last, b))  # rows that are not used

    def tensor(values):
        return torch.tensor(values, dtype=torch.int32, device=q.device)

    rows, begin, end, sequence = ([p[n] for p in pieces] for n in range(4))
    ends = [0]
    for n in rows:
        ends.append(ends[-1] + n)
    if table is None:  # the chunks of packed keys lie one behind the other, with gaps
        used, begin = tensor([b - a for a, b in zip(begin, end, strict=True)]), [*begin, k.shape[0]]
        longest = max(b - a for a, b in zip(begin, begin[1:], strict=False))
        keys = dict(cu_seqlens_k=tensor(begin), seqused_k=used, max_seqlen_k=longest)
    else:
        keys = dict(
            cu_seqlens_k=None, max_seqlen_k=table.shape[1] * k.shape[1], seqused_k=tensor(end),
            leftpad_k=tensor(begin), page_table=table[tensor(sequence).long()],
        )  # fmt: skip
    packed = dict(cu_seqlens_q=tensor(ends), max_seqlen_q=max([1, *rows]), **keys)
    slopes = options.get("alibi_slopes")
    if isinstance(slopes, Tensor) and slopes.dim() == 2:
        options = options | dict(alibi_slopes=slopes[tensor(sequence).long()])
    return packed, k, v, options


def _list(lengths):
    return None if lengths is None else lengths.tolist()
