"""Which calls the suite makes: the CPU tests' generators, over the head dims and features that choose a kernel.

A kernel is compiled for each group, so that a group's cases share what changes instructions and differ in all else.
"""

import random
from dataclasses import dataclass, replace

from cache_cases import random_cache_case
from cases import MASKS, Case, everything, grid, random_case

DIMS = [
    (64, 64), (128, 128), (32, 64), (64, 128), (192, 128), (128, 256), (96, 192), (256, 256), (40, 72), (8, 8),
    (16, 16), (96, 80), (256, 64), (24, 248), (72, 40), (200, 136), (8, 256), (112, 112), (160, 32), (48, 96),
]  # fmt: skip
FORWARD_ONLY_DIMS = [(512, 512), (576, 512)]
CACHE_DIMS = [(64, 64), (128, 128), (192, 128), (256, 256), (40, 72), (128, 64), (80, 80), (16, 24)]
DTYPES = ("bf16", "fp16")
# softcap, alibi, dropout: what a Config knows of the score. Paged keys are added to each in turn.
FEATURES = [
    (0.0, None, 0.0), (20.0, None, 0.0), (0.0, "h", 0.0), (0.0, None, 0.2), (1.0, "bh", 0.0), (0.0, "bh", 0.6),
]  # fmt: skip
SHARED_HEADS = [(4, 2, 2), (4, 1, 1), (6, 2, 2), (8, 1, 1), (6, 1, 3), (8, 2, 2)]
OWN_HEADS = [(2, 2, 2), (1, 1, 1), (4, 2, 4), (6, 2, 3), (3, 3, 1)]
PAGES = [8, 16, 24, 64, 256]


@dataclass(frozen=True)
class Job:
    """kind: what checks it (jobs.py). Backward jobs check the forward pass, too."""

    kind: str  # "forward", "backward", "deterministic", "cache", "repeat", "scenario"
    case: object
    seed: int = 0
    backend: str = None

    def __str__(self):
        return f"{self.kind} {self.case} seed={self.seed} backend={self.backend}"


def attention_group(n, dims, dtype, features, paged, cases):
    rng = random.Random(1000 + n)
    softcap, alibi, dropout = features
    heads = SHARED_HEADS if n % 2 else OWN_HEADS
    longest = rng.choice([100, 200, 330]) if max(dims) <= 256 else 140
    kinds = ("forward",) if paged or max(dims) > 256 else ("forward", "backward", "backward", "deterministic")
    jobs = []
    for at in range(cases):
        case = random_case(rng, ("paged",) if paged else ("dense", "packed"), longest)
        num_heads, heads_k, heads_v = rng.choice(heads)
        case = replace(
            case, dtype=dtype, head_dim=dims[0], head_dim_v=dims[1], heads=num_heads, heads_k=heads_k, heads_v=heads_v,
            softcap=softcap, alibi=alibi, dropout=dropout, page_size=rng.choice(PAGES) if paged else None,
        )  # fmt: skip
        if dims[0] > 128 and case.scale:
            case = replace(case, scale=0.1)  # scores of a size that half types can tell apart
        jobs.append(Job(kinds[at % len(kinds)], case, rng.randrange(1 << 16)))
    return jobs


def attention_groups(cases=14):
    groups = []
    for n, dims in enumerate(DIMS + FORWARD_ONLY_DIMS):
        for m, dtype in enumerate(DTYPES):
            for at in range(4):
                features = FEATURES[(2 * n + 3 * m + at) % len(FEATURES)]
                groups.append(attention_group(8 * n + 4 * m + at, dims, dtype, features, at == 3, cases))
    return groups


def curated_groups():
    """Every mask, length pair and head layout of cases.grid(), which is written for any dtype and head dim."""
    groups = {}
    for n, case in enumerate(grid()):
        dims = [-(-d // 8) * 8 for d in (case.head_dim, case.head_dim_v)]
        case = replace(case, dtype=DTYPES[n % 2] if case.dtype == "fp32" else case.dtype)
        case = replace(case, head_dim=dims[0], head_dim_v=dims[1])
        groups.setdefault((*dims, case.dtype, case.softcap), []).append(
            Job("deterministic" if n % 3 == 0 else "backward", case, n)
        )
    for dtype in DTYPES:
        jobs = groups.setdefault(("everything", dtype), [])
        jobs += [
            Job(("backward", "deterministic")[seed % 2], replace(everything(), dtype=dtype), seed) for seed in range(8)
        ]
        paged = replace(everything(), dtype=dtype, layout="paged", page_size=16)
        jobs += [Job("forward", paged, seed) for seed in range(8)]
    return list(groups.values())


def cache_groups(cases=12):
    groups = []
    for n, dims in enumerate(CACHE_DIMS):
        for m, dtype in enumerate(DTYPES):
            for at in range(4):
                rng = random.Random(5000 + 8 * n + 4 * m + at)
                group = [cache_case(rng, dims, dtype, at) for _ in range(cases)]
                groups.append([Job("cache", case, rng.randrange(1 << 16)) for case in group])
    return groups


def cache_case(rng, dims, dtype, at):
    case = random_cache_case(rng)
    softcap, alibi, _ = (FEATURES[0], FEATURES[1], FEATURES[2], FEATURES[4])[at]
    num_heads, heads_k, heads_v = rng.choice(SHARED_HEADS if at % 2 == 0 else SHARED_HEADS + OWN_HEADS)
    cached = tuple(rng.choice([n, n, 8 * n, rng.randint(300, 3000)]) for n in case.cached)
    turning = case.seqlen_new and dims[0] >= 16 and rng.choice([False, True])
    return replace(
        case, cached=cached, dtype=dtype, head_dim=dims[0], head_dim_v=dims[1], softcap=softcap, alibi=alibi,
        heads=num_heads, heads_k=heads_k, heads_v=heads_v, page_size=rng.choice(PAGES) if at >= 2 else None,
        batch_idx=case.batch_idx and at < 2, rotary_dim=16 * rng.randint(1, dims[0] // 16) if turning else 0,
    )  # fmt: skip


def long_groups():
    """Sequences that fill the tiles and the schedules of long calls; scores that outgrow those of the tiles before."""
    masks = [
        dict(), dict(causal=True), dict(causal=True, window=(1000, 0), keep_first=4),
        dict(causal=True, window=(127, 0)), dict(window=(300, 50), keep_first=16),
        dict(causal=True, window=(500, 0), keep_first=90, full_from=1900),
    ]  # fmt: skip
    dims = [(64, 64), (32, 64), (40, 72), (96, 96), (64, 128), (128, 128), (192, 128), (256, 256)]
    groups = []
    for n, (d, dv) in enumerate(dims):
        group = []
        for m, mask in enumerate(masks):
            heads = [(2, 2, 2), (4, 2, 2), (4, 1, 1)][(n + m) % 3]
            case = Case(
                dtype=DTYPES[(n + m) % 2], head_dim=d, head_dim_v=dv, heads=heads[0], heads_k=heads[1],
                heads_v=heads[2], scale=0.5 if max(d, dv) <= 128 and m % 2 else None, sinks=m == 3, **mask,
            )  # fmt: skip
            group.append(Job("forward", replace(case, seqlens_q=(2200,)), m))
            mixed = (34, 600, 0, 260, 34, 700, 1)
            group.append(Job("forward", replace(case, seqlens_q=mixed, seqlens_k=mixed, layout="packed"), m))
        groups.append(group)
    return groups


def pair_groups():
    """Long queries of wide heads that see every key: neighbouring row blocks may share tiles (test_plan_sm90 knows)."""
    groups = []
    for n, (d, dv) in enumerate([(128, 256), (256, 256), (72, 200), (200, 136)]):
        group = []
        for m, (lengths, heads) in enumerate([((4500,), (2, 2, 2)), ((4500,), (2, 1, 2)), ((1125,) * 2, (4, 1, 1))]):
            for softcap in (0.0, 20.0):
                case = Case(
                    lengths, (100,) * len(lengths), DTYPES[(n + m) % 2], d, dv, *heads,
                    softcap=softcap, sinks=m == 1, strided=(None, "sliced", "transposed")[m],
                )  # fmt: skip
                group.append(Job("forward", case, m))
        groups.append(group)
    return groups


def repeat_groups():
    """Calls whose bits must not change from run to run, with enough rows for many blocks to race."""
    groups = []
    for n, dims in enumerate([(64, 64), (128, 128), (192, 128), (256, 256), (40, 72)]):
        for dtype in DTYPES:
            group = []
            for mask in MASKS:
                case = replace(
                    everything(), seqlens_q=(333, 1, 0, 250, 18), seqlens_k=(410, 330, 60, 250, 3), dtype=dtype,
                    head_dim=dims[0], head_dim_v=dims[1], window=(-1, -1), keep_first=0, force_fa_decode=False,
                    full_from=None, softcap=0.0, dropout=0.2 * (n % 2),
                )  # fmt: skip
                group.append(Job("repeat", replace(case, **mask), n))
            groups.append(group)
    return groups


def groups():
    """All jobs; the groups whose kernels take longest to compile come first."""
    every = attention_groups() + curated_groups() + cache_groups() + long_groups() + pair_groups() + repeat_groups()
    return sorted(every, key=lambda jobs: -max(job.case.head_dim * job.case.head_dim_v for job in jobs))
