"""Every kind of bad call is refused: the exception's type, and a text that names the function, what was given and
what is allowed. Nothing is written to any tensor of a refused call."""

import re
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

import strobe

BATCH, SEQLEN_Q, SEQLEN_K, HEADS, HEADS_K, HEADS_V, DIM, DIM_V = 2, 3, 5, 4, 2, 1, 16, 8
TOTAL_Q, TOTAL_K = 7, 9
PAGES, PAGE_SIZE, CAPACITY = 6, 4, 8
NAN, INF = float("nan"), float("inf")


def floats(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def ints(*values, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


def unset(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.full(shape, NAN, dtype=dtype)


def same_memory(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    buffer = floats(max(torch.Size(shape).numel() for shape in shapes))
    return [buffer[: torch.Size(shape).numel()].view(shape) for shape in shapes]


def fixed() -> dict:
    return {
        "q": floats(BATCH, SEQLEN_Q, HEADS, DIM),
        "k": floats(BATCH, SEQLEN_K, HEADS_K, DIM),
        "v": floats(BATCH, SEQLEN_K, HEADS_V, DIM_V),
        "out": unset(BATCH, SEQLEN_Q, HEADS, DIM_V),
    }


def packed() -> dict:
    return {
        "q": floats(TOTAL_Q, HEADS, DIM),
        "k": floats(TOTAL_K, HEADS_K, DIM),
        "v": floats(TOTAL_K, HEADS_V, DIM_V),
        "cu_seqlens_q": ints(0, 3, 7),
        "cu_seqlens_k": ints(0, 4, 9),
        "max_seqlen_q": 4,
        "max_seqlen_k": 5,
        "out": unset(TOTAL_Q, HEADS, DIM_V),
    }


def paged() -> dict:
    return {
        "q": floats(TOTAL_Q, HEADS, DIM),
        "k": floats(PAGES, PAGE_SIZE, HEADS_K, DIM),
        "v": floats(PAGES, PAGE_SIZE, HEADS_V, DIM_V),
        "cu_seqlens_q": ints(0, 3, 7),
        "cu_seqlens_k": None,
        "max_seqlen_q": 4,
        "max_seqlen_k": 7,
        "seqused_k": ints(7, 4),
        "page_table": ints((5, 0), (2, -1)),
        "out": unset(TOTAL_Q, HEADS, DIM_V),
    }


def cached() -> dict:
    return {
        "q": floats(BATCH, SEQLEN_Q, HEADS, DIM),
        "k_cache": floats(BATCH, CAPACITY, HEADS_K, DIM),
        "v_cache": floats(BATCH, CAPACITY, HEADS_V, DIM_V),
        "cache_seqlens": ints(5, 2),
        "out": unset(BATCH, SEQLEN_Q, HEADS, DIM_V),
    }


def appended() -> dict:
    new = {"k": floats(BATCH, SEQLEN_Q, HEADS_K, DIM), "v": floats(BATCH, SEQLEN_Q, HEADS_V, DIM_V)}
    return cached() | new | {"causal": True}


def turned() -> dict:
    return appended() | {"rotary_cos": floats(CAPACITY, DIM // 2), "rotary_sin": floats(CAPACITY, DIM // 2)}


def paged_cache() -> dict:
    pages = {"k_cache": floats(PAGES, PAGE_SIZE, HEADS_K, DIM), "v_cache": floats(PAGES, PAGE_SIZE, HEADS_V, DIM_V)}
    return cached() | pages | {"page_table": ints((5, 0), (2, -1))}


FUNCTIONS = {
    fixed: "flash_attn_func",
    packed: "flash_attn_varlen_func",
    paged: "flash_attn_varlen_func",
    cached: "flash_attn_with_kvcache",
    appended: "flash_attn_with_kvcache",
    turned: "flash_attn_with_kvcache",
    paged_cache: "flash_attn_with_kvcache",
}


class Row(NamedTuple):
    id: str
    base: Callable[[], dict]  # a valid call
    change: Callable[[dict], dict]  # the arguments that spoil it
    error: type[Exception]
    given: str  # pattern of what the text says was given
    allowed: str  # pattern of what it says is allowed


def row(id: str, base: Callable[[], dict], error: type[Exception], given: str, allowed: str, **change) -> Row:
    return Row(id, base, lambda _: change, error, given, allowed)


V, T = ValueError, TypeError
bf16, f16, f64, i64 = torch.bfloat16, torch.float16, torch.float64, torch.int64

ROWS = [
    # Ranks
    row("q-rank-2", fixed, V, "q has 2 dimensions", "4", q=floats(3, DIM)),
    row(
        "q-packed-without-cu",
        fixed,
        V,
        "q has 3 dimensions but cu_seqlens_q is not given",
        r"\(packed\) or 4",
        q=floats(3, HEADS, DIM),
    ),
    row("k-rank-3", fixed, V, "k has 3 dimensions", r"4: \[batch", k=floats(5, HEADS_K, DIM)),
    row("v-rank-5", fixed, V, "v has 5 dimensions", r"4: \[batch", v=floats(2, 5, 1, 8, 1)),
    row("packed-q-rank-4", packed, V, "q has 4 dimensions", r"3: \[total_q", q=floats(1, TOTAL_Q, HEADS, DIM)),
    row("packed-k-rank-4", packed, V, "k has 4 dimensions", r"3: \[total_k", k=floats(1, TOTAL_K, HEADS_K, DIM)),
    row("paged-k-rank-3", paged, V, "k has 3 dimensions", r"4: \[num_pages", k=floats(24, HEADS_K, DIM)),
    row("cache-rank-3", cached, V, "k_cache has 3 dimensions", "4", k_cache=floats(8, HEADS_K, DIM)),
    # Dtypes
    row("q-f64", fixed, T, "q is ", "f32, f16 or bf16", q=floats(2, 3, 4, 16, dtype=f64)),
    row("q-int32", fixed, T, "q is int32", "f32, f16 or bf16", q=torch.zeros(2, 3, 4, 16, dtype=torch.int32)),
    row("k-bf16", fixed, T, "k is bf16", "f32 as q is", k=floats(2, 5, 2, 16, dtype=bf16)),
    row("v-f16", fixed, T, "v is f16", "f32 as q is", v=floats(2, 5, 1, 8, dtype=f16)),
    row("out-bf16", fixed, T, "out is bf16", "f32", out=unset(2, 3, 4, 8, dtype=bf16)),
    row("cu-q-int64", packed, T, "cu_seqlens_q is int64", "int32", cu_seqlens_q=ints(0, 3, 7, dtype=i64)),
    row("cu-k-int64", packed, T, "cu_seqlens_k is int64", "int32", cu_seqlens_k=ints(0, 4, 9, dtype=i64)),
    row("seqused-k-int64", fixed, T, "seqused_k is int64", "int32", seqused_k=ints(5, 5, dtype=i64)),
    row("seqused-q-int64", packed, T, "seqused_q is int64", "int32", seqused_q=ints(3, 4, dtype=i64)),
    row("leftpad-int64", packed, T, "leftpad_k is int64", "int32", leftpad_k=ints(0, 1, dtype=i64)),
    row("page-table-int64", paged, T, "page_table is int64", "int32", page_table=ints((5, 0), (2, 1), dtype=i64)),
    row("cache-idx-int64", cached, T, "cache_batch_idx is int64", "int32", cache_batch_idx=ints(0, 1, dtype=i64)),
    row("full-from-f32", fixed, T, "full_from is f32", "int32", full_from=floats(BATCH)),
    row("alibi-f16", fixed, T, "alibi_slopes is f16", "f32", alibi_slopes=floats(HEADS, dtype=f16)),
    row("s-aux-int32", fixed, T, "s_aux is int32", "f32, f16 or bf16", s_aux=ints(0, 0, 0, 0)),
    row("k-new-bf16", appended, T, "k_new is bf16", "f32", k=floats(2, 3, 2, 16, dtype=bf16)),
    row("rotary-bf16", turned, T, "rotary_cos is bf16", "f32", rotary_cos=floats(8, 8, dtype=bf16)),
    # Shapes of q, k, v
    row("batch-k", fixed, V, "batch of k is 3 but of q is 2", "equal", k=floats(3, 5, 2, 16), v=floats(3, 5, 1, 8)),
    row("batch-v", fixed, V, "batch of v is 3 but of k is 2", "equal", v=floats(3, 5, 1, 8)),
    row("seqlen-v", fixed, V, "seqlen of v is 6 but of k is 5", "equal", v=floats(2, 6, 1, 8)),
    row("head-dim-k", fixed, V, "head_dim of k is 8 but of q is 16", "equal", k=floats(2, 5, 2, 8)),
    row("heads-k", fixed, V, "k has 3 heads", "divisor of the 4 heads of q", k=floats(2, 5, 3, 16)),
    row("heads-v", fixed, V, "v has 3 heads", "divisor of the 4 heads of q", v=floats(2, 5, 3, 8)),
    row("heads-k-more", fixed, V, "k has 8 heads", "divisor of the 4 heads of q", k=floats(2, 5, 8, 16)),
    row("no-heads-q", fixed, V, "q has 0 heads", "at least 1", q=floats(2, 3, 0, 16)),
    row("no-heads-k", fixed, V, "k has 0 heads", "at least 1", k=floats(2, 5, 0, 16)),
    row("no-heads-v", fixed, V, "v has 0 heads", "at least 1", v=floats(2, 5, 0, 8)),
    row("no-head-dim", fixed, V, "head_dim of q is 0", "at least 1", q=floats(2, 3, 4, 0), k=floats(2, 5, 2, 0)),
    row("no-head-dim-v", fixed, V, "head_dim of v is 0", "at least 1", v=floats(2, 5, 1, 0)),
    row("packed-total-v", packed, V, "total length of v is 8 but of k is 9", "equal", v=floats(8, 1, 8)),
    row("pages-v", paged, V, "num_pages of v is 5 but of k is 6", "equal", v=floats(5, 4, 1, 8)),
    row("page-size-v", paged, V, "page_size of v is 2 but of k is 4", "equal", v=floats(6, 2, 1, 8)),
    row("page-size-0", paged, V, "page_size of k is 0", "at least 1", k=floats(6, 0, 2, 16), v=floats(6, 0, 1, 8)),
    row(
        "cache-batch",
        cached,
        V,
        "batch of k_cache is 3 but of q is 2",
        "equal",
        k_cache=floats(3, 8, 2, 16),
        v_cache=floats(3, 8, 1, 8),
    ),
    # Outputs
    row("out-head-dim", fixed, V, r"out has shape \[2, 3, 4, 16\]", r"\[2, 3, 4, 8\]", out=unset(2, 3, 4, 16)),
    row("out-rank", fixed, V, "out has 3 dimensions", "4", out=unset(2, 3, 32)),
    row("out-packed", packed, V, r"out has shape \[9, 4, 8\]", r"\[7, 4, 8\]", out=unset(9, 4, 8)),
    row("out-last-stride", fixed, V, "last dimension of out has stride 2", "1", out=unset(2, 3, 4, 16)[..., ::2]),
    row(
        "out-expanded", fixed, V, "elements of it share memory", "no overlap", out=unset(2, 1, 4, 8).expand(2, 3, 4, 8)
    ),
    Row(
        "out-is-q",
        fixed,
        lambda _: dict(zip(("q", "out"), same_memory((2, 3, 4, 16), (2, 3, 4, 8)))),
        V,
        "out overlaps q",
        "no overlap",
    ),
    Row(
        "out-is-v",
        fixed,
        lambda _: dict(zip(("v", "out"), same_memory((2, 5, 1, 8), (2, 3, 4, 8)))),
        V,
        "out overlaps v",
        "no overlap",
    ),
    # Packed sequences
    row("cu-k-missing", packed, V, "cu_seqlens_k is not", "both or neither", cu_seqlens_k=None),
    row("cu-q-missing", packed, V, "cu_seqlens_q is not", "both or neither", cu_seqlens_q=None),
    row("cu-q-rank", packed, V, "cu_seqlens_q has 2 dimensions", r"1: \[batch \+ 1\]", cu_seqlens_q=ints((0, 3, 7))),
    row("cu-q-empty", packed, V, "cu_seqlens_q is empty", r"\[batch \+ 1\]", cu_seqlens_q=ints()),
    row("cu-q-strided", packed, V, "cu_seqlens_q has stride 2", "1", cu_seqlens_q=ints(0, 0, 3, 0, 7, 0)[::2]),
    row("cu-batches", packed, V, "cu_seqlens_k has 2 elements", "3 as cu_seqlens_q has", cu_seqlens_k=ints(0, 9)),
    row("cu-q-first", packed, V, "cu_seqlens_q begins with 1", "0", cu_seqlens_q=ints(1, 3, 7)),
    row(
        "cu-q-decreasing", packed, V, "cu_seqlens_q decreases from 8 to 7", "not decreasing", cu_seqlens_q=ints(0, 8, 7)
    ),
    row("cu-q-last", packed, V, "cu_seqlens_q ends with 6", "total length 7 of q", cu_seqlens_q=ints(0, 3, 6)),
    row("cu-k-last", packed, V, "cu_seqlens_k ends with 10", "total length 9 of k", cu_seqlens_k=ints(0, 4, 10)),
    row("max-q-small", packed, V, "max_seqlen_q is 3", "at least the longest sequence's 4", max_seqlen_q=3),
    row("max-k-small", packed, V, "max_seqlen_k is 4", "at least the longest sequence's 5", max_seqlen_k=4),
    row("max-q-negative", packed, V, "max_seqlen_q is -2", "at least 0", max_seqlen_q=-2),
    row("seqused-k-shape", fixed, V, r"seqused_k has shape \[3\]", r"\[batch\] = \[2\]", seqused_k=ints(5, 5, 5)),
    row("seqused-k-large", fixed, V, r"seqused_k\[1\] is 6", "0 to 5", seqused_k=ints(5, 6)),
    row("seqused-k-negative", fixed, V, r"seqused_k\[0\] is -1", "0 to 5", seqused_k=ints(-1, 5)),
    row("seqused-q-large", packed, V, r"seqused_q\[0\] is 4", "0 to 3", seqused_q=ints(4, 4)),
    row("packed-seqused-k-large", packed, V, r"seqused_k\[0\] is 5", "0 to 4", seqused_k=ints(5, 5)),
    row("leftpad-negative", packed, V, r"leftpad_k\[1\] is -1", "0 to the 5 keys", leftpad_k=ints(0, -1)),
    row("leftpad-large", packed, V, r"leftpad_k\[0\] is 5", "0 to the 4 keys", leftpad_k=ints(5, 0)),
    row(
        "leftpad-behind-used",
        packed,
        V,
        r"leftpad_k\[0\] is 3",
        "0 to the 2 keys",
        leftpad_k=ints(3, 0),
        seqused_k=ints(2, 5),
    ),
    # Pages
    row("page-table-rank", paged, V, "page_table has 1 dimensions", r"2: \[batch, max_pages\]", page_table=ints(5, 0)),
    row("page-table-batch", paged, V, "page_table has 3 rows", "the batch, 2", page_table=ints((5, 0), (2, 1), (3, 4))),
    row("page-too-large", paged, V, r"page_table\[0\]\[1\] is 6", "0 to 5", page_table=ints((5, 6), (2, -1))),
    row("page-negative", paged, V, r"page_table\[0\]\[1\] is -1", "0 to 5", page_table=ints((5, -1), (2, -1))),
    row("page-columns", paged, V, r"seqused_k\[0\] is 7", "0 to 4", page_table=ints((5,), (2,))),
    row(
        "page-columns-cu",
        paged,
        V,
        "page_table has 2 columns but sequence 0 has 9 keys",
        "at least 3",
        seqused_k=None,
        cu_seqlens_k=ints(0, 9, 13),
        max_seqlen_k=9,
    ),
    row("page-without-seqused", paged, V, "page_table is given but seqused_k is not", "both", seqused_k=None),
    row("paged-seqused-k-large", paged, V, r"seqused_k\[1\] is 9", "0 to 8", seqused_k=ints(7, 9)),
    row("paged-max-k-small", paged, V, "max_seqlen_k is 6", "longest sequence's 7", max_seqlen_k=6),
    row(
        "cache-page-negative",
        paged_cache,
        V,
        r"page_table\[1\]\[0\] is -1",
        "0 to 5",
        page_table=ints((5, 0), (-1, -1)),
    ),
    row(
        "cache-page-and-idx",
        paged_cache,
        V,
        "cache_batch_idx and page_table are both given",
        "one of them",
        cache_batch_idx=ints(0, 1),
    ),
    # Mask and score
    row("full-from-shape", fixed, V, r"full_from has shape \[3\]", r"\[2\]", full_from=ints(0, 0, 0)),
    row("full-from-negative", fixed, V, r"full_from\[1\] is -1", "at least 0", full_from=ints(0, -1)),
    row("window-left", fixed, V, r"window_size is \(-2, 0\)", "at least 0, or -1", window_size=(-2, 0)),
    row("window-right", fixed, V, r"window_size is \(0, -7\)", "at least 0, or -1", window_size=(0, -7)),
    row("keep-first", fixed, V, "keep_first is -1", "at least 0", keep_first=-1),
    row("alibi-heads", fixed, V, r"alibi_slopes has shape \[3\]", r"= \[4\]", alibi_slopes=floats(3)),
    row("alibi-batch", fixed, V, r"alibi_slopes has shape \[3, 4\]", r"= \[2, 4\]", alibi_slopes=floats(3, 4)),
    row("alibi-strided", fixed, V, "alibi_slopes has stride 2", "1", alibi_slopes=floats(8)[::2]),
    row("s-aux-heads", fixed, V, r"s_aux has shape \[2\]", r"\[num_heads\] = \[4\]", s_aux=floats(2)),
    row("s-aux-rank", fixed, V, "s_aux has 2 dimensions", r"1: \[num_heads\]", s_aux=floats(2, 4)),
    row("scale-nan", fixed, V, "softmax_scale is nan", "finite", softmax_scale=NAN),
    row("scale-inf", fixed, V, "softmax_scale is inf", "finite", softmax_scale=INF),
    row("softcap-negative", fixed, V, "softcap is -1", r"0 \(off\)", softcap=-1.0),
    row("softcap-nan", fixed, V, "softcap is nan", r"0 \(off\)", softcap=NAN),
    row("softcap-inf", fixed, V, "softcap is inf", "finite", softcap=INF),
    row("softcap-dropout", fixed, V, "softcap is 2 and dropout_p is 0.5", "one of them", softcap=2.0, dropout_p=0.5),
    row("dropout-1", fixed, V, "dropout_p is 1", r"\[0, 1\)", dropout_p=1.0),
    row("dropout-negative", fixed, V, "dropout_p is -0.1", r"\[0, 1\)", dropout_p=-0.1),
    row("dropout-nan", fixed, V, "dropout_p is nan", r"\[0, 1\)", dropout_p=NAN),
    row("backend", fixed, V, "backend is 'fpga'", "'auto' or 'cpu'", backend="fpga"),
    # Cache
    row("k-without-v", appended, V, "k_new is given but v_new is not", "both or neither", v=None),
    row("v-without-k", appended, V, "v_new is given but k_new is not", "both or neither", k=None),
    row("new-without-seqlens", appended, V, "k_new is given but cache_seqlens is not", "both", cache_seqlens=None),
    row("new-batch", appended, V, r"k_new has shape \[1, 3, 2, 16\]", r"\[2, 3, 2, 16\]", k=floats(1, 3, 2, 16)),
    row("new-heads", appended, V, r"v_new has shape \[2, 3, 2, 8\]", r"\[2, 3, 1, 8\]", v=floats(2, 3, 2, 8)),
    row("new-lengths", appended, V, r"v_new has shape \[2, 2, 1, 8\]", r"\[2, 3, 1, 8\]", v=floats(2, 2, 1, 8)),
    row("new-rank", appended, V, "k_new has 3 dimensions", "4", k=floats(6, 2, 16)),
    row(
        "append-overflow",
        appended,
        V,
        r"cache_seqlens\[0\] is 6 and 3 keys are appended",
        "up to 8 in all",
        cache_seqlens=ints(6, 2),
    ),
    row("cache-seqlens-large", cached, V, r"cache_seqlens\[1\] is 9", "0 to 8", cache_seqlens=ints(5, 9)),
    row("cache-leftpad", cached, V, r"cache_leftpad\[1\] is 3", "0 to the 2 keys", cache_leftpad=ints(0, 3)),
    row("cache-idx-large", cached, V, r"cache_batch_idx\[1\] is 2", "0 to 1", cache_batch_idx=ints(0, 2)),
    row("cache-idx-negative", cached, V, r"cache_batch_idx\[0\] is -1", "0 to 1", cache_batch_idx=ints(-1, 1)),
    row("cache-idx-shape", cached, V, r"cache_batch_idx has shape \[1\]", r"\[2\]", cache_batch_idx=ints(0)),
    row("cache-idx-twice", appended, V, "names row 1 twice", "once", cache_batch_idx=ints(1, 1)),
    row(
        "cache-last-stride",
        cached,
        V,
        "last dimension of k_cache has stride 2",
        "1",
        k_cache=floats(2, 8, 2, 32)[..., ::2],
    ),
    row(
        "cache-expanded",
        appended,
        V,
        "k_cache is written",
        "no overlap",
        k_cache=floats(1, 8, 2, 16).expand(2, 8, 2, 16),
    ),
    row("rotary-without-new", turned, V, "rotary_cos is given but k_new is not", "only with new keys", k=None, v=None),
    row("rotary-sin-missing", turned, V, "rotary_cos is given but rotary_sin is not", "both", rotary_sin=None),
    row("rotary-cos-missing", turned, V, "rotary_sin is given but rotary_cos is not", "both", rotary_cos=None),
    row("rotary-shapes", turned, V, r"rotary_sin has shape \[8, 4\]", r"\[8, 8\]", rotary_sin=floats(8, 4)),
    row("rotary-rank", turned, V, "rotary_cos has 1 dimensions", "2", rotary_cos=floats(8)),
    row(
        "rotary-dim-8", turned, V, "rotary_dim is 8", "multiple of 16", rotary_cos=floats(8, 4), rotary_sin=floats(8, 4)
    ),
    row(
        "rotary-dim-32",
        turned,
        V,
        "rotary_dim is 32",
        "16 to head_dim 16",
        rotary_cos=floats(8, 16),
        rotary_sin=floats(8, 16),
    ),
    row(
        "rotary-short",
        turned,
        V,
        "rotary_cos has 7 rows",
        "at least 8 rows",
        rotary_cos=floats(7, 8),
        rotary_sin=floats(7, 8),
    ),
]


def tensors(arguments: dict) -> dict[str, torch.Tensor]:
    return {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor)}


def test_rows_are_distinct():
    assert len({r.id for r in ROWS}) == len(ROWS) >= 80


@pytest.mark.parametrize("base", FUNCTIONS, ids=lambda base: base.__name__)
def test_unspoiled_call_passes(base: Callable[[], dict]):
    arguments = base()
    getattr(strobe, FUNCTIONS[base])(**arguments)
    assert not arguments["out"].isnan().any()


@pytest.mark.parametrize("r", ROWS, ids=lambda r: r.id)
def test_bad_call_is_refused(r: Row):
    function = FUNCTIONS[r.base]
    arguments = r.base()
    arguments |= r.change(arguments)
    before = {name: tensor.clone() for name, tensor in tensors(arguments).items()}
    with pytest.raises((ValueError, TypeError)) as caught:
        getattr(strobe, function)(**arguments)
    text = str(caught.value)
    assert caught.type is r.error, text
    assert text.startswith(f"{function}: "), text
    assert re.search(f"{r.given}.*allowed is .*{r.allowed}", text), text
    for name, tensor in tensors(arguments).items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, equal_nan=True, msg=f"{name} was written")
