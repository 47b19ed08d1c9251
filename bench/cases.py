"""What is timed: a task is one case of the tests' generator and what to do with it."""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "py"))

from cases import DTYPES, Case, make_inputs  # noqa: F401  the same generator as in the tests

KINDS = {  # kind: how a case's name starts where a suite holds several kinds
    "forward": "forward ",
    "backward": "backward ",
    "decode": "",
    "memory": "",
    "host": "no grad ",
    "host_grad": "with grad ",
    "append": "",
    "new_forward": "new Config, forward ",
    "new_backward": "new Config, backward ",
    "again_forward": "second process, forward ",
    "again_backward": "second process, backward ",
}
RATES = {"GFLOP/s": 1.0, "TFLOP/s": 1e-3, "GB/s": 1.0, "TB/s": 1e-3}  # of 1e9 operations or bytes in a second
TIMES = {"s": 1.0, "ms": 1e3, "us": 1e6}  # of a second
ONE_KIND = ("fwd", "bwd")


@dataclass(frozen=True)
class Task:
    suite: str
    kind: str
    case: Case
    unit: str

    @property
    def name(self):
        return ("" if self.suite in ONE_KIND else KINDS[self.kind]) + label(self.case)


def one(values):
    """'4096', or '1..4096' where sequences differ."""
    return f"{values[0]}" if len(set(values)) == 1 else f"{min(values)}..{max(values)}"


def label(case):
    dims = f"d{case.head_dim}" + (f"/{case.head_dim_v}" if case.head_dim_v != case.head_dim else "")
    length = one(case.seqlens_q) + ("" if case.seqlens_q == case.seqlens_k else f"/{one(case.seqlens_k)}")
    heads = f"{case.heads}/{case.heads_k}" + (f"/{case.heads_v}" if case.heads_v != case.heads_k else "")
    mask = "causal" if case.causal else "full"
    words = [dims, mask, f"S={length}", f"B={case.batch}", f"H={heads}", case.dtype]
    if case.window != (-1, -1):
        words.append(f"window {case.window[0]}+{case.keep_first}")
    if case.page_size:
        words.append(f"page {case.page_size}")
    if case.softcap:
        words.append(f"softcap {case.softcap:g}")
    return " ".join(words)


def params(case):
    return {
        "dtype": case.dtype,
        "head_dim": case.head_dim,
        "head_dim_v": case.head_dim_v,
        "seqlen_q": max(case.seqlens_q),
        "seqlen_k": max(case.seqlens_k),
        "batch": case.batch,
        "heads": case.heads,
        "heads_k": case.heads_k,
        "heads_v": case.heads_v,
        "causal": case.causal,
        "window": None if case.window == (-1, -1) else list(case.window),
        "keep_first": case.keep_first,
        "page_size": case.page_size,
        "softcap": case.softcap,
    }


def bounds(case, seqlen_q, seqlen_k):
    """Per query row, the keys of its window [low, high); keys below keep_first are seen as well."""
    at = np.arange(seqlen_q) + seqlen_k - seqlen_q
    left, right = case.window
    right = 0 if case.causal else right
    low = np.zeros_like(at) if left < 0 else np.maximum(0, at - left)
    high = np.full_like(at, seqlen_k) if right < 0 else np.clip(at + right + 1, 0, seqlen_k)
    return low, high


def visible_pairs(case):
    """Pairs of query and key that see each other, per query head."""
    pairs = 0
    for seqlen_q, seqlen_k in zip(case.seqlens_q, case.seqlens_k, strict=True):
        low, high = bounds(case, seqlen_q, seqlen_k)
        pairs += int((np.maximum(0, high - low) + np.minimum(np.minimum(case.keep_first, low), high)).sum())
    return pairs


def dense_mask(case):
    """The same as a boolean matrix [seqlen_q, seqlen_k], for peers that know no window."""
    low, high = (torch.from_numpy(x)[:, None] for x in bounds(case, case.seqlens_q[0], case.seqlens_k[0]))
    keys = torch.arange(case.seqlens_k[0])[None]
    return (keys < high) & ((keys >= low) | (keys < case.keep_first))


def amount(task):
    """What a row's rate counts, per call: 1e9 operations on visible pairs, or 1e9 bytes of visible keys and values."""
    case = task.case
    if task.unit in ("GB/s", "TB/s"):
        assert max(case.seqlens_q) == 1, "with more queries, keys are read once for several pairs"
        row = case.heads_k * case.head_dim + case.heads_v * case.head_dim_v
        return visible_pairs(case) * row * DTYPES[case.dtype].itemsize / 1e9
    per_pair = {
        "forward": case.head_dim + case.head_dim_v,
        "decode": case.head_dim + case.head_dim_v,
        "backward": 3 * case.head_dim + 2 * case.head_dim_v,
    }[task.kind]
    return 2 * visible_pairs(case) * per_pair * case.heads / 1e9


def in_unit(task, seconds):
    if task.unit in TIMES:
        return seconds * TIMES[task.unit]
    return amount(task) * RATES[task.unit] / seconds
