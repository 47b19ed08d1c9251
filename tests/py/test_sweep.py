"""Random mixtures of all features, found and shrunk by hypothesis."""

from hypothesis import given, note, settings
from hypothesis import strategies as st

import cache_cases
from cases import make_inputs, random_case
from checks import check_forward, check_gradients

seeds = st.integers(0, 2**16)


@settings(max_examples=150)
@given(st.randoms(use_true_random=False), seeds)
def test_forward(strobe, rng, seed):
    case = random_case(rng)
    note(repr(case))
    check_forward(strobe, make_inputs(case, seed))


@settings(max_examples=100)
@given(st.randoms(use_true_random=False), seeds, st.booleans())
def test_backward(strobe, rng, seed, with_lse):
    case = random_case(rng, layouts=("dense", "packed"))
    note(repr(case))
    check_gradients(strobe, make_inputs(case, seed), with_lse)


@settings(max_examples=150)
@given(st.randoms(use_true_random=False), seeds)
def test_kvcache(strobe, rng, seed):
    case = cache_cases.random_cache_case(rng)
    note(repr(case))
    cache_cases.check(strobe, cache_cases.make_cache(case, seed))
