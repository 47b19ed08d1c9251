"""Index tensors with garbage in them: nothing faults, nothing outside of the tensors is read or written.

Everything inside is finite, and all memory outside is NaN: a result that is not finite was read from outside.
"""

import random

import torch
from scenario import ints, randn, scenario

from cache_cases import same_bits

GARBAGE = [-(2**31), -70000, -1, 0, 1, 5, 63, 64, 1000, 70000, 2**30, 2**31 - 1]
SEEDS = [dict(seed=seed) for seed in range(40)]


def _garbage(rng, *shape):
    count = torch.Size(shape).numel()
    values = [rng.choice([*GARBAGE, rng.randint(-5, 200)]) for _ in range(count)]
    return ints(*values).view(shape)


def _maybe(rng, make):
    return make() if rng.random() < 0.5 else None


def _finite(out, lse):
    assert out.isfinite().all(), "the output is not finite"
    assert not lse.isnan().any() and (lse != -float("inf")).all(), "the LSE is not finite"


@scenario(SEEDS, guarded=True)
def packed(strobe, seed):
    rng = random.Random(seed)
    q, k, v = randn(150, 4, 64), randn(170, 2, 64), randn(170, 2, 64)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse, _ = strobe.flash_attn_varlen_func(
        q, k, v, _garbage(rng, 4), _garbage(rng, 4), rng.choice([0, 1, 150, 100000]), rng.choice([1, 90, 170, 100000]),
        causal=rng.choice([False, True]), window_size=rng.choice([(-1, -1), (9, 3)]), keep_first=rng.choice([0, 4]),
        seqused_q=_maybe(rng, lambda: _garbage(rng, 3)), seqused_k=_maybe(rng, lambda: _garbage(rng, 3)),
        leftpad_k=_maybe(rng, lambda: _garbage(rng, 3)), full_from=_maybe(rng, lambda: _garbage(rng, 3)),
        return_attn_probs=True,
    )  # fmt: skip
    # Sequences that overlap, or rows that none of them holds, have results nobody defined; memory stays whole.
    torch.autograd.grad(out.sum(), leaves)
    torch.cuda.synchronize()


@scenario(SEEDS, guarded=True)
def paged(strobe, seed):
    rng = random.Random(seed)
    size = rng.choice([8, 16, 64])
    q, k, v = randn(60, 4, 64), randn(9, size, 2, 64), randn(9, size, 2, 64)
    out, lse, _ = strobe.flash_attn_varlen_func(
        q, k, v, ints(0, 13, 13, 60), None, 47, 7 * size, causal=rng.choice([False, True]),
        window_size=rng.choice([(-1, -1), (9, 3)]), keep_first=rng.choice([0, 4]),
        seqused_k=_garbage(rng, 3), leftpad_k=_maybe(rng, lambda: _garbage(rng, 3)), page_table=_garbage(rng, 3, 7),
        full_from=_maybe(rng, lambda: _garbage(rng, 3)), return_attn_probs=True,
    )  # fmt: skip
    _finite(out, lse)


@scenario(SEEDS, guarded=True)
def cache(strobe, seed):
    rng = random.Random(seed)
    pages = rng.choice([None, 8, 16])
    entries = None if pages else _maybe(rng, lambda: _garbage(rng, 3))
    lead = (11, pages) if pages else (3 if entries is None else 6, 90)
    k_cache, v_cache = randn(*lead, 2, 64), randn(*lead, 2, 64)
    new = rng.choice([0, 1, 5])
    turn = rng.choice([False, True]) if new else False
    fresh = [randn(3, new, 2, 64) for _ in range(2)] if new else ()
    angle = torch.rand(120, 16, device="cuda").bfloat16()
    out, lse = strobe.flash_attn_with_kvcache(
        randn(3, rng.choice([1, 4, 30]), 8, 64), k_cache, v_cache, *fresh,
        rotary_cos=angle.cos() if turn else None, rotary_sin=angle.sin() if turn else None,
        cache_seqlens=_garbage(rng, 3), cache_batch_idx=entries,
        cache_leftpad=_maybe(rng, lambda: _garbage(rng, 3)), block_table=_garbage(rng, 3, 6) if pages else None,
        causal=rng.choice([False, True]), window_size=rng.choice([(-1, -1), (40, 0)]), keep_first=rng.choice([0, 3]),
        num_splits=rng.choice([0, 1, 4]), return_softmax_lse=True,
    )  # fmt: skip
    _finite(out, lse)
    assert k_cache.isfinite().all() and v_cache.isfinite().all(), "what was appended came from outside"


@scenario(guarded=True)
def lengths_beyond_the_table_equal_the_whole_cache(strobe):
    q, k, v, table = randn(2, 1, 4, 64), randn(9, 16, 2, 64), randn(9, 16, 2, 64), ints(3, 1, 8, 0, 7, 2).view(2, 3)
    whole, beyond = (
        strobe.flash_attn_with_kvcache(q, k, v, cache_seqlens=ints(n, n), block_table=table) for n in (48, 2**31 - 1)
    )
    assert same_bits(whole, beyond)


@scenario([dict(dtype=d) for d in (torch.bfloat16, torch.float16)], guarded=True)
def infinities_in_unused_keys(strobe, dtype):
    """Keys beyond the sequence and left padding may hold anything. (What the mask hides is multiplied by zero.)"""
    for poison in (float("nan"), float("inf")):
        q, k, v = (randn(2, n, 2, 64, dtype=dtype) for n in (30, 300, 300))
        options = dict(cache_seqlens=ints(250, 200), cache_leftpad=ints(70, 5), causal=True, return_softmax_lse=True)
        clean = strobe.flash_attn_with_kvcache(q, k, v, **options)
        for t in (k, v):
            t[0, 250:], t[1, 200:], t[0, :70], t[1, :5] = [poison] * 4
        dirty = strobe.flash_attn_with_kvcache(q, k, v, **options)
        assert dirty[0].isfinite().all(), f"{poison} in unused keys reached {(~dirty[0].isfinite()).sum()} values"
        assert all(map(same_bits, clean, dirty))
