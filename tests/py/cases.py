"""The one generator of attention calls, for tests and for the benchmark.

A Case is a plain description; make_inputs() turns it into tensors whose unused memory (keys beyond seqused_k, left
padding, unused pages, gaps between strides) is NaN, and run() makes the call.
"""

import itertools
import random
from dataclasses import dataclass, replace

import torch

from reference import Problem, dropout_keep

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
NAN = float("nan")


@dataclass(frozen=True)
class Case:
    seqlens_q: tuple = (64,)
    seqlens_k: tuple = None  # None: as seqlens_q. Keys that take part, left padding not counted
    dtype: str = "fp32"
    head_dim: int = 64
    head_dim_v: int = None
    heads: int = 2
    heads_k: int = None
    heads_v: int = None
    causal: bool = False
    window: tuple = (-1, -1)
    keep_first: int = 0
    force_fa_decode: bool = False
    full_from: object = None  # int, or one per sequence
    softcap: float = 0.0
    alibi: str = None  # "h" or "bh"
    dropout: float = 0.0
    sinks: bool = False
    scale: float = None
    layout: str = "dense"  # "dense", "packed", "paged" (packed q)
    page_size: int = None
    seqused: bool = False  # more rows in memory than used (k, and packed q)
    leftpad: bool = False  # packed and paged
    strided: str = None  # "transposed", "sliced"

    def __post_init__(self):
        def default(name, value):
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

        default("seqlens_k", self.seqlens_q)
        default("head_dim_v", self.head_dim)
        default("heads_k", self.heads)
        default("heads_v", self.heads_k)

    @property
    def batch(self):
        return len(self.seqlens_q)

    def __str__(self):
        changed = [
            f"{name}={value}".replace(" ", "")
            for name, value in vars(self).items()
            if name == "dtype" or value != getattr(DEFAULT, name)
        ]
        return ",".join(changed)


DEFAULT = Case()


@dataclass
class Inputs:
    case: Case
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dout: torch.Tensor
    dlse: torch.Tensor  # f32, as lse
    sinks: torch.Tensor
    slopes: torch.Tensor
    full_from: object
    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    seqused_q: torch.Tensor
    seqused_k: torch.Tensor
    leftpad_k: torch.Tensor
    page_table: torch.Tensor
    capacity_q: int
    capacity_k: int
    problem: Problem

    def options(self):
        case = self.case
        return dict(
            dropout_p=case.dropout,
            softmax_scale=case.scale,
            causal=case.causal,
            window_size=case.window,
            softcap=case.softcap,
            alibi_slopes=self.slopes,
            keep_first=case.keep_first,
            force_fa_decode=case.force_fa_decode,
            full_from=self.full_from,
        )


def strided_like(values, how):
    """The same values with other strides; what lies between is NaN."""
    if how == "transposed":
        return values.transpose(-3, -2).contiguous().transpose(-3, -2)
    if how == "sliced":
        *lead, rows, heads, dim = values.shape
        wide = values.new_full((*lead, rows + 1, heads + 1, dim + 3), NAN)
        wide[..., :rows, 1:, 2 : dim + 2] = values
        return wide[..., :rows, 1:, 2 : dim + 2]
    return values


def offsets(lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def rows_of(starts, lengths):
    return [torch.arange(s, s + n) for s, n in zip(starts, lengths, strict=True)]


def make_pages(rng, lengths, page_size, spare=2):
    """A shuffled page table with -1 in unused columns, its number of pages, and each sequence's rows."""
    needed = [-(-n // page_size) for n in lengths]
    pages = list(range(sum(needed) + spare))
    rng.shuffle(pages)
    table = torch.full((len(lengths), max(needed) + 1), -1, dtype=torch.int32)
    rows = []
    for b, n in enumerate(needed):
        mine = torch.tensor([pages.pop() for _ in range(n)], dtype=torch.long)
        table[b, :n] = mine
        index = torch.arange(lengths[b])
        rows.append(mine[index // page_size] * page_size + index % page_size if n else index)
    return table, sum(needed) + spare, rows


def fill(generator, shape, rows, dtype, how):
    """Normal values in the given rows of the flattened tensor, NaN elsewhere."""
    values = torch.full(shape, NAN, dtype=dtype)
    used = torch.cat([*rows, torch.empty(0, dtype=torch.long)])
    flat = values.view(-1, *shape[-2:])
    flat[used] = torch.randn(len(used), *shape[-2:], generator=generator).to(dtype)
    return strided_like(values, how)


def make_inputs(case, seed=0):
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    dtype, batch, packed_q = DTYPES[case.dtype], case.batch, case.layout != "dense"
    pads = [rng.randint(0, 5) if case.leftpad else 0 for _ in range(batch)]
    spare_k = [rng.randint(0, 4) if case.seqused else 0 for _ in range(batch)]
    spare_q = [rng.randint(0, 3) if case.seqused and packed_q else 0 for _ in range(batch)]
    used_k = [n + pad for n, pad in zip(case.seqlens_k, pads, strict=True)]  # left padding included
    held_k = [n + spare for n, spare in zip(used_k, spare_k, strict=True)]
    held_q = [n + spare for n, spare in zip(case.seqlens_q, spare_q, strict=True)]
    page_table = None

    if packed_q:
        cu_q = offsets(held_q)
        q_lead, q_rows = (sum(held_q),), rows_of(cu_q.tolist()[:-1], case.seqlens_q)
    else:
        assert len(set(case.seqlens_q)) == 1, "dense queries have one length"
        assert case.seqused or len(set(case.seqlens_k)) == 1, "dense keys have one length without seqused"
        held_q, held_k = [max(held_q)] * batch, [max(held_k)] * batch
        cu_q, q_lead = None, (batch, held_q[0])
        q_rows = rows_of([b * held_q[0] for b in range(batch)], case.seqlens_q)
    if case.layout == "paged":
        page_table, num_pages, k_rows = make_pages(rng, used_k, case.page_size)
        k_lead = (num_pages, case.page_size)
    else:
        k_lead = (sum(held_k),) if packed_q else (batch, held_k[0])
        k_rows = rows_of([sum(held_k[:b]) for b in range(batch)], used_k)
    k_rows = [rows[pad:] for rows, pad in zip(k_rows, pads, strict=True)]

    slopes = None
    if case.alibi:
        shape = (batch, case.heads) if case.alibi == "bh" else (case.heads,)
        slopes = torch.rand(shape, generator=generator) * 0.3
    full_from = case.full_from
    if isinstance(full_from, tuple):
        full_from = torch.tensor(full_from, dtype=torch.int32)
    per_sequence = [case.full_from] * batch if isinstance(case.full_from, int) else case.full_from
    problem = Problem(
        q_rows,
        k_rows,
        case.head_dim**-0.5 if case.scale is None else case.scale,
        case.causal,
        case.window,
        case.keep_first,
        case.force_fa_decode,
        per_sequence,
        case.softcap,
        slopes,
        case.dropout,
    )
    with_used = case.seqused or case.layout == "paged"
    lse_shape = (case.heads, sum(held_q)) if packed_q else (batch, case.heads, held_q[0])
    return Inputs(
        case,
        q=fill(generator, (*q_lead, case.heads, case.head_dim), q_rows, dtype, case.strided),
        k=fill(generator, (*k_lead, case.heads_k, case.head_dim), k_rows, dtype, case.strided),
        v=fill(generator, (*k_lead, case.heads_v, case.head_dim_v), k_rows, dtype, case.strided),
        dout=fill(generator, (*q_lead, case.heads, case.head_dim_v), q_rows, dtype, case.strided),
        dlse=torch.randn(lse_shape, generator=generator),
        sinks=torch.randn(case.heads, generator=generator) if case.sinks else None,
        slopes=slopes,
        full_from=full_from,
        cu_seqlens_q=cu_q,
        cu_seqlens_k=offsets(held_k) if packed_q and page_table is None else None,
        seqused_q=torch.tensor(case.seqlens_q, dtype=torch.int32) if case.seqused and packed_q else None,
        seqused_k=torch.tensor(used_k, dtype=torch.int32) if with_used else None,
        leftpad_k=torch.tensor(pads, dtype=torch.int32) if case.leftpad else None,
        page_table=page_table,
        capacity_q=max(held_q),
        capacity_k=max(held_k),
        problem=problem,
    )


def run(strobe, inputs, q=None, k=None, v=None, sinks=None, **extra):
    """The call that the case describes, through the public function for its layout."""
    q, k, v = (inputs.q if q is None else q), (inputs.k if k is None else k), (inputs.v if v is None else v)
    options = inputs.options() | dict(s_aux=inputs.sinks if sinks is None else sinks) | extra
    if inputs.cu_seqlens_q is None:
        return strobe.flash_attn_func(q, k, v, seqused_k=inputs.seqused_k, **options)
    return strobe.flash_attn_varlen_func(
        q,
        k,
        v,
        inputs.cu_seqlens_q,
        inputs.cu_seqlens_k,
        inputs.capacity_q,
        inputs.capacity_k,
        seqused_q=inputs.seqused_q,
        seqused_k=inputs.seqused_k,
        leftpad_k=inputs.leftpad_k,
        page_table=inputs.page_table,
        **options,
    )


def set_keep(inputs, seed, offset):
    """Gives the oracle the dropout mask that (seed, offset) means."""
    rows = zip(inputs.problem.q_rows, inputs.problem.k_rows, strict=True)
    inputs.problem.keep = [
        dropout_keep(seed, offset, inputs.case.dropout, b, inputs.case.heads, len(q), len(k))
        for b, (q, k) in enumerate(rows)
    ]


HEAD_DIMS = [(64, 64), (32, 64), (64, 128), (192, 128), (40, 72), (33, 17), (1, 1), (128, 256)]
LENGTHS = [(1, 1), (1, 67), (67, 1), (5, 130), (130, 5), (97, 97), (64, 128), (0, 7), (7, 0), (0, 0)]
MASKS = [
    dict(),
    dict(causal=True),
    dict(window=(7, 0)),
    dict(window=(5, 3)),
    dict(window=(-1, 2)),
    dict(window=(4, -1)),
    dict(window=(0, 0)),
    dict(causal=True, window=(9, -1), keep_first=3),
    dict(window=(3, 2), keep_first=20),
    dict(causal=True, window=(3, 0), keep_first=1, full_from=11),
    dict(window=(2, 1), full_from=0),
]
# Of packed or paged sequences of different lengths.
RAGGED_CHANGES = [
    dict(),
    dict(causal=True),
    dict(window=(6, 3), keep_first=2, force_fa_decode=True),
    dict(seqused=True),
    dict(leftpad=True, causal=True),
    dict(seqused=True, leftpad=True, sinks=True, alibi="bh"),
    dict(dropout=0.3, window=(20, 0), keep_first=4),
    dict(strided="sliced"),
]


def grid():
    """Curated cases: every head-dim pair, length pair, mask, dtype and head layout at least once."""
    cases = []
    for n, (d, dv) in enumerate(HEAD_DIMS):
        for dtype in DTYPES:
            cases.append(Case((37,), (53,), dtype, d, dv, causal=n % 2 == 1))
    for sq, sk in LENGTHS:
        for mask in ({}, dict(causal=True), dict(causal=True, window=(8, 0), keep_first=2)):
            cases.append(Case((sq, sq), (sk, sk), "fp32", 16, 24, **mask))
    for n, mask in enumerate(MASKS):
        for sq, sk in ((75, 75), (40, 150), (150, 40)):
            cases.append(Case((sq,), (sk,), list(DTYPES)[n % 3], 32, **mask))
    for heads, heads_k, heads_v in ((4, 2, 2), (4, 1, 1), (4, 4, 1), (6, 2, 3), (6, 1, 6)):
        cases.append(Case((33,), (47,), "fp32", 24, 40, heads, heads_k, heads_v, causal=True))
        cases.append(Case((33,), (47,), "bf16", 64, 32, heads, heads_k, heads_v))
    base = Case((50, 50), (61, 61), "fp32", 32, 48, 4, 2, 1)
    for change in (
        dict(softcap=1.5),
        dict(alibi="h"),
        dict(alibi="bh", causal=True),
        dict(sinks=True),
        dict(sinks=True, causal=True, window=(6, 0), softcap=2.0),
        dict(scale=0.0),
        dict(scale=-0.7),
        dict(dropout=0.3),
        dict(dropout=0.9, causal=True),
        dict(strided="transposed"),
        dict(strided="sliced"),
        dict(seqused=True, seqlens_k=(17, 61)),
        dict(full_from=(5, 40), causal=True, window=(4, 0)),
    ):
        cases.append(replace(base, **change))
        cases.append(replace(base, dtype="bf16", **change))
    return cases


def everything():
    """All of the definition in one packed call."""
    return Case(
        (29, 1, 0, 45, 18),
        (40, 33, 6, 45, 3),
        head_dim=40,
        head_dim_v=72,
        heads=6,
        heads_k=2,
        heads_v=3,
        window=(9, 4),
        keep_first=3,
        force_fa_decode=True,
        full_from=(20, 5, 0, 30, 2),
        alibi="bh",
        dropout=0.2,
        sinks=True,
        layout="packed",
        seqused=True,
        leftpad=True,
    )


def random_case(rng, layouts=("dense", "packed", "paged"), max_seqlen=70):
    """Any mixture of features that calls allow. rng: random.Random, or hypothesis's."""
    layout = rng.choice(layouts)
    batch = rng.randint(1, 3)
    heads = rng.choice([1, 2, 4, 6])
    divisors = [n for n in range(1, heads + 1) if heads % n == 0]
    d, dv = rng.choice(HEAD_DIMS + [(8, 8), (16, 16), (96, 80)])
    seqused = rng.choice([False, True])

    def length():
        return rng.choice([0, 1, 2, 3, 16, 17, 64, 65, rng.randint(0, max_seqlen)])

    def lengths(ragged):
        return tuple(length() for _ in range(batch)) if ragged else (length(),) * batch

    softcap = rng.choice([0.0, 0.0, 0.0, 1.0, 20.0])
    return Case(
        lengths(layout != "dense"),
        lengths(layout != "dense" or seqused),
        rng.choice(list(DTYPES)),
        d,
        dv,
        heads,
        rng.choice(divisors),
        rng.choice(divisors),
        causal=rng.choice([False, True]),
        window=rng.choice([(-1, -1), (rng.randint(-1, 40), rng.randint(-1, 20)), (rng.randint(0, 9), 0)]),
        keep_first=rng.choice([0, 0, 1, rng.randint(0, 80)]),
        force_fa_decode=rng.choice([False, True]),
        full_from=rng.choice([None, rng.randint(0, 70), tuple(rng.randint(0, 70) for _ in range(batch))]),
        softcap=softcap,
        alibi=rng.choice([None, None, "h", "bh"]),
        dropout=0.0 if softcap else rng.choice([0.0, 0.0, 0.1, 0.6]),
        sinks=rng.choice([False, False, True]),
        scale=rng.choice([None, None, 0.3]),
        layout=layout,
        page_size=rng.choice([1, 3, 16, 256]) if layout == "paged" else None,
        seqused=seqused,
        leftpad=layout != "dense" and rng.choice([False, True]),
        strided=rng.choice([None, None, "transposed", "sliced"]),
    )
