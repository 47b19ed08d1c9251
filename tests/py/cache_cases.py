"""Calls with a KV cache: their description, inputs with poisoned unused memory, and the oracle's answer."""

import random
from dataclasses import dataclass

import torch

import reference
from cases import DTYPES, HEAD_DIMS, NAN, make_pages
from reference import Problem


@dataclass(frozen=True)
class CacheCase:
    cached: tuple = (40,)  # keys in the cache before the call, left padding included
    seqlen_q: int = 1
    seqlen_new: int = 0
    dtype: str = "fp32"
    head_dim: int = 64
    head_dim_v: int = 64
    heads: int = 4
    heads_k: int = 2
    heads_v: int = 2
    causal: bool = False
    window: tuple = (-1, -1)
    keep_first: int = 0
    force_fa_decode: bool = False
    full_from: object = None
    softcap: float = 0.0
    alibi: str = None
    sinks: bool = False
    page_size: int = None  # None: not paged
    batch_idx: bool = False  # the cache has more rows than the batch
    leftpad: bool = False
    rotary_dim: int = 0
    interleaved: bool = True
    num_splits: int = 0

    def __str__(self):
        changed = [f"{n}={v}".replace(" ", "") for n, v in vars(self).items() if v != getattr(DEFAULT, n)]
        return ",".join(changed) or "default"


DEFAULT = CacheCase()


@dataclass
class CacheInputs:
    case: CacheCase
    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    sinks: torch.Tensor
    cache_seqlens: torch.Tensor
    batch_idx: torch.Tensor
    leftpad: torch.Tensor
    page_table: torch.Tensor
    rows: list  # per sequence, the flattened cache's rows of positions 0 .. cached + new - 1
    problem: Problem


def make_cache(case, seed=0):
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    dtype, batch = DTYPES[case.dtype], len(case.cached)

    def randn(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    totals = [n + case.seqlen_new for n in case.cached]
    table = batch_idx = cos = sin = None
    if case.page_size:
        table, pages, rows = make_pages(rng, totals, case.page_size)
        lead, capacity = (pages, case.page_size), table.shape[1] * case.page_size
    else:
        capacity = max(totals) + rng.randint(0, 5)
        entries = list(range(batch + 2 if case.batch_idx else batch))
        if case.batch_idx:
            rng.shuffle(entries)
            batch_idx = torch.tensor(entries[:batch], dtype=torch.int32)
        lead = (len(entries), capacity)
        rows = [torch.arange(n) + entries[b] * capacity for b, n in enumerate(totals)]
    pads = [rng.randint(0, min(4, n)) if case.leftpad else 0 for n in case.cached]

    caches = []
    for heads, dim in ((case.heads_k, case.head_dim), (case.heads_v, case.head_dim_v)):
        cache = torch.full((*lead, heads, dim), NAN, dtype=dtype)
        for row, n, pad in zip(rows, case.cached, pads, strict=True):
            cache.view(-1, heads, dim)[row[pad:n]] = randn(n - pad, heads, dim)
        caches.append(cache)
    if case.rotary_dim:
        angle = torch.outer(
            torch.arange(capacity + case.seqlen_q), 1000.0 ** -torch.linspace(0, 1, case.rotary_dim // 2)
        )
        cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    slopes = None
    if case.alibi:
        slopes = torch.rand((batch, case.heads) if case.alibi == "bh" else case.heads, generator=generator) * 0.3
    problem = Problem(
        [torch.arange(case.seqlen_q) + b * case.seqlen_q for b in range(batch)],
        [row[pad:] for row, pad in zip(rows, pads, strict=True)],
        case.head_dim**-0.5,
        case.causal,
        case.window,
        case.keep_first,
        case.force_fa_decode,
        None if case.full_from is None else [case.full_from] * batch,
        case.softcap,
        slopes,
    )
    return CacheInputs(
        case,
        randn(batch, case.seqlen_q, case.heads, case.head_dim),
        *caches,
        randn(batch, case.seqlen_new, case.heads_k, case.head_dim) if case.seqlen_new else None,
        randn(batch, case.seqlen_new, case.heads_v, case.head_dim_v) if case.seqlen_new else None,
        cos,
        sin,
        torch.randn(case.heads, generator=generator) if case.sinks else None,
        torch.tensor(case.cached, dtype=torch.int32),
        batch_idx,
        torch.tensor(pads, dtype=torch.int32) if case.leftpad else None,
        table,
        rows,
        problem,
    )


def oracle(inputs, dtype):
    """out, lse, k_cache, v_cache after the call, computed in dtype."""
    case = inputs.case
    q, k_cache, v_cache = (x.to(dtype) for x in (inputs.q, inputs.k_cache, inputs.v_cache))
    q, k_cache, v_cache = q.clone(), k_cache.clone(), v_cache.clone()
    for b, cached in enumerate(case.cached):
        if case.rotary_dim:
            # Rows of q advance only where the mask orders them.
            ordered = case.causal or max(case.window) >= 0
            positions = cached + torch.arange(case.seqlen_q) * int(ordered)
            q[b] = reference.rotary(q[b], inputs.cos, inputs.sin, positions, case.interleaved)
        if case.seqlen_new:
            rows, k_new = inputs.rows[b][cached:], inputs.k[b].to(dtype)
            if case.rotary_dim:
                positions = cached + torch.arange(case.seqlen_new)
                k_new = reference.rotary(k_new, inputs.cos, inputs.sin, positions, case.interleaved)
            k_cache.view(-1, *k_cache.shape[-2:])[rows] = k_new
            v_cache.view(-1, *v_cache.shape[-2:])[rows] = inputs.v[b].to(dtype)
    out, lse = reference.attention(inputs.problem, q, k_cache, v_cache, inputs.sinks)
    return out, reference.shape_lse(lse, q), k_cache, v_cache


def call(strobe, inputs, k_cache, v_cache, **extra):
    case = inputs.case
    options = dict(
        k=inputs.k,
        v=inputs.v,
        rotary_cos=inputs.cos,
        rotary_sin=inputs.sin,
        cache_seqlens=inputs.cache_seqlens,
        cache_batch_idx=inputs.batch_idx,
        cache_leftpad=inputs.leftpad,
        block_table=inputs.page_table,
        causal=case.causal,
        window_size=case.window,
        softcap=case.softcap,
        rotary_interleaved=case.interleaved,
        alibi_slopes=inputs.problem.slopes,
        num_splits=case.num_splits,
        return_softmax_lse=True,
        keep_first=case.keep_first,
        force_fa_decode=case.force_fa_decode,
        full_from=case.full_from,
        s_aux=inputs.sinks,
    )
    return strobe.flash_attn_with_kvcache(inputs.q, k_cache, v_cache, **(options | extra))


def same_bits(a, b):
    """Equal as bits, so that NaN equals NaN."""
    kind = torch.int32 if a.dtype == torch.float32 else torch.int16
    return torch.equal(a.contiguous().view(kind), b.contiguous().view(kind))


def check(strobe, inputs):
    case, dtype = inputs.case, inputs.q.dtype
    k_cache, v_cache = inputs.k_cache.clone(), inputs.v_cache.clone()
    poisoned = torch.full((*inputs.q.shape[:-1], case.head_dim_v), NAN, dtype=dtype)
    q_before = inputs.q.clone()
    out, lse = call(strobe, inputs, k_cache, v_cache, out=poisoned)
    assert out.data_ptr() == poisoned.data_ptr() or not out.numel()
    assert same_bits(inputs.q, q_before), "q was written"

    truth, budget = oracle(inputs, torch.float64), oracle(inputs, dtype)
    scale = truth[0].abs().max().item() if truth[0].numel() else 0.0
    reference.assert_close("out", out, truth[0], budget[0], 2, reference.floor_of(dtype, scale))
    finite = truth[1][truth[1].isfinite()]
    scale = max(1.0, finite.abs().max().item()) if finite.numel() else 1.0
    # The turned k is rounded to its dtype in the cache (and q may be), and the LSE sees that.
    lse_dtype = dtype if case.rotary_dim else torch.float32
    lse_budget = oracle(inputs, lse_dtype)[1]
    reference.assert_close("lse", lse, truth[1], lse_budget, 2, reference.floor_of(lse_dtype, scale))

    # Appended rows hold what they should, all others their old bits.
    assert same_bits(v_cache, budget[3]), "v_cache"
    if not case.rotary_dim:
        assert same_bits(k_cache, budget[2]), "k_cache"
        return
    fresh = torch.cat([row[n:] for row, n in zip(inputs.rows, case.cached, strict=True)])
    flat, expected, rounded = (x.reshape(-1, *x.shape[-2:]) for x in (k_cache, truth[2], budget[2]))
    kept = torch.ones(len(flat), dtype=torch.bool).index_fill(0, fresh, False)
    assert same_bits(flat[kept], inputs.k_cache.reshape(flat.shape)[kept]), "rows that were not appended to changed"
    scale = expected[fresh].abs().max().item() if fresh.numel() else 0.0
    floor = reference.floor_of(dtype, scale)
    reference.assert_close("k_cache", flat[fresh], expected[fresh], rounded[fresh], 2, floor)


def random_cache_case(rng):
    batch, heads = rng.randint(1, 3), rng.choice([1, 2, 4, 6])
    divisors = [n for n in range(1, heads + 1) if heads % n == 0]
    d, dv = rng.choice(HEAD_DIMS)
    seqlen_new = rng.choice([0, 1, 1, 2, 7])
    paged = rng.choice([None, None, 1, 3, 16, 256])
    turning = seqlen_new and d >= 16 and rng.choice([False, True])
    return CacheCase(
        tuple(rng.choice([0, 1, 2, 63, 64, rng.randint(0, 150)]) for _ in range(batch)),
        rng.choice([1, 1, 1, 2, 5, 17]),
        seqlen_new,
        rng.choice(list(DTYPES)),
        d,
        dv,
        heads,
        rng.choice(divisors),
        rng.choice(divisors),
        causal=rng.choice([False, True]),
        window=rng.choice([(-1, -1), (rng.randint(0, 40), rng.randint(0, 9)), (rng.randint(0, 9), 0)]),
        keep_first=rng.choice([0, 0, 1, rng.randint(0, 80)]),
        force_fa_decode=rng.choice([False, True]),
        full_from=rng.choice([None, None, rng.randint(0, 8)]),
        softcap=rng.choice([0.0, 0.0, 1.0]),
        alibi=rng.choice([None, "h", "bh"]),
        sinks=rng.choice([False, True]),
        page_size=paged,
        batch_idx=not paged and rng.choice([False, True]),
        leftpad=rng.choice([False, True]),
        rotary_dim=16 * rng.randint(1, d // 16) if turning else 0,
        interleaved=rng.choice([False, True]),
        num_splits=rng.choice([0, 1, 3]),
    )
