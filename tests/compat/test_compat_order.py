"""Whose order positional arguments are in: FlashAttention's, SWAA's, or a TypeError that shows the keywords."""

import inspect

import flash_attn
import flash_attn.swaa
import flash_attn_vllm
import pytest
import torch
from flash_attn import flash_attn_interface
from oracle import dense, offsets, tensors

SEVEN = sorted(flash_attn.__all__)
HEAD = {"flash_attn_with_kvcache": 14}


def same(a, b):
    assert torch.equal(a, b), (a - b).abs().max()


def arguments(name, grad=False):
    """The tensors of a call and what comes before softmax_scale's group, for each of the six functions."""
    q, k, v = tensors(1, 12, 12, 2, 2, grad=grad)
    cu = offsets([5, 7])
    dense_qkv, dense_kv = torch.stack((q, k, v), 2), torch.stack((k, v), 2)
    return {
        "flash_attn_func": (q, k, v),
        "flash_attn_kvpacked_func": (q, dense_kv),
        "flash_attn_qkvpacked_func": (dense_qkv,),
        "flash_attn_varlen_func": (q[0], k[0], v[0], cu, cu, 7, 7),
        "flash_attn_varlen_kvpacked_func": (q[0], dense_kv[0], cu, cu, 7, 7),
        "flash_attn_varlen_qkvpacked_func": (dense_qkv[0], cu, 7),
    }[name]


SIX = [name for name in SEVEN if name != "flash_attn_with_kvcache"]
MIDDLE = (0.0, 0.3, True, (3, 0), 0.0)  # dropout_p, softmax_scale, causal, window_size, softcap
OPTIONS = dict(softmax_scale=0.3, causal=True, window_size=(3, 0))
SLOPES = torch.tensor([0.25, 0.5])


@pytest.mark.parametrize("name", SIX)
def test_positions_of_swaa_are_told_by_an_int_after_softcap(name):
    function, args = getattr(flash_attn, name), arguments(name)
    expected = function(*args, **OPTIONS, keep_first=2, force_fa_decode=True)
    assert not torch.equal(expected, function(*args, **OPTIONS))
    same(function(*args, *MIDDLE, 2), function(*args, **OPTIONS, keep_first=2))
    same(function(*args, *MIDDLE, 2, True), expected)
    sloped = function(*args, **OPTIONS, keep_first=2, alibi_slopes=SLOPES)
    same(function(*args, *MIDDLE, 2, False, SLOPES, True), sloped)
    out, lse, probs = function(*args, *MIDDLE, 2, True, None, False, True)
    same(out, expected)
    same(function(*args, *MIDDLE, 2, True, deterministic=True), expected)


@pytest.mark.parametrize("name", SIX)
def test_positions_of_flash_attention_stay(name):
    function, args = getattr(flash_attn, name), arguments(name)
    expected = function(*args, **OPTIONS, alibi_slopes=SLOPES)
    assert not torch.equal(expected, function(*args, **OPTIONS))
    same(function(*args, *MIDDLE, SLOPES), expected)
    same(function(*args, *MIDDLE, SLOPES, True, False), expected)
    same(function(*args, *MIDDLE, None, True, True)[0], function(*args, **OPTIONS))


@pytest.mark.parametrize("name", SIX)
@pytest.mark.parametrize("module", [flash_attn.swaa, flash_attn_vllm], ids=lambda m: m.__name__)
def test_exact_positions_of_swaa(module, name):
    function, args = getattr(module, name), arguments(name)
    keyword = getattr(flash_attn, name)
    expected = keyword(*args, **OPTIONS, keep_first=2, force_fa_decode=True, alibi_slopes=SLOPES)
    same(function(*args, *MIDDLE, 2, True, SLOPES, True), expected)
    same(function(*args, **OPTIONS, keep_first=2, force_fa_decode=True, alibi_slopes=SLOPES), expected)
    names = list(inspect.signature(function).parameters)
    at = names.index("softcap")
    expected = ["softcap", "keep_first", "force_fa_decode", "alibi_slopes", "deterministic", "return_attn_probs"]
    assert names[at : at + 6] == expected
    with pytest.raises(TypeError, match="keep_first is given by position .* and by keyword"):
        function(*args, *MIDDLE, 2, keep_first=2)


@pytest.mark.parametrize("tail", [(2, None), (2, SLOPES), (True,), (False, True), (2, 1)], ids=str)
def test_an_order_that_cannot_be_told_shows_the_keywords(tail):
    with pytest.raises(TypeError, match=r"flash_attn_func\(\.\.\., keep_first=.*flash_attn\.swaa\.flash_attn_func"):
        flash_attn.flash_attn_func(*arguments("flash_attn_func"), *MIDDLE, *tail)


def test_too_many_positions_are_refused():
    with pytest.raises(TypeError, match="14 positional arguments are given, it takes at most 13"):
        flash_attn.flash_attn_func(*arguments("flash_attn_func"), *MIDDLE, 2, True, None, False, False, None)


def cache_head():
    q, k, v = tensors(2, 1, 20, 2, 2)
    return (q, k, v, None, None, None, None, 20, None, None, None, 0.3, True, (3, 0), 0.0)


def test_kvcache_positions():
    function, head = flash_attn.flash_attn_with_kvcache, cache_head()
    expected = function(*head, keep_first=2)
    full = function(*head, keep_first=2, force_fa_decode=True)
    stock = function(*head)
    assert not torch.equal(expected, full) and not torch.equal(expected, stock)
    same(function(*head, 2), expected)
    same(function(*head, 2, True), full)
    same(function(*head, 1, True, True, None, 0, True)[0], function(*head, keep_first=1, force_fa_decode=True))
    same(function(*head, True), stock)
    same(function(*head, True, None, 1, True)[0], stock)
    same(function(*head, 1, SLOPES), function(*head, alibi_slopes=SLOPES))  # 1 for True
    same(flash_attn.swaa.flash_attn_with_kvcache(*head, 1, True), function(*head, keep_first=1, force_fa_decode=True))


@pytest.mark.parametrize("tail", [(0,), (1,), (True, True), (2, 3)], ids=str)
def test_kvcache_order_that_cannot_be_told_shows_the_keywords(tail):
    with pytest.raises(TypeError, match=r"flash_attn_with_kvcache\(\.\.\., keep_first="):
        flash_attn.flash_attn_with_kvcache(*cache_head(), *tail)


@pytest.mark.parametrize("name", SEVEN)
def test_names_are_real_parameters(name):
    """Programs find what a function can do by its signature."""
    parameters = inspect.signature(getattr(flash_attn, name)).parameters
    wanted = {"window_size", "softcap", "keep_first", "force_fa_decode", "s_aux", "causal", "softmax_scale"}
    if name != "flash_attn_with_kvcache":
        wanted |= {"deterministic", "dropout_p"}
    assert wanted <= set(parameters)
    assert not any(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in parameters.values())


def test_semi_private_functions_take_both_orders():
    q, k, v = tensors(1, 9, 9, 2, 2)
    forward = flash_attn_interface._flash_attn_forward
    stock = (q, k, v, 0.0, 0.3, True, 3, 0, 0.0)
    expected = forward(*stock, None, False, keep_first=2, force_fa_decode=True)[:2]
    for result in (
        forward(*stock, 2, True, None, False),
        forward(*stock, keep_first=2, force_fa_decode=True, alibi_slopes=None, return_softmax=False),
        flash_attn.swaa._flash_attn_forward(*stock, 2, True, None, False),
        flash_attn_vllm.flash_attn_interface._flash_attn_forward(*stock, 2, True, None, False),
    ):
        same(result[0], expected[0])
        same(result[1], expected[1])
    truth = dense(*(x.double() for x in (q, k, v)), scale=0.3, causal=True, window=(3, 0), keep_first=2)[0]
    torch.testing.assert_close(expected[0].double(), truth, atol=1e-5, rtol=0)
    with pytest.raises(TypeError, match="_flash_attn_forward.*keep_first=2"):
        forward(*stock, 2, None, False)


def test_semi_private_backward_takes_both_orders():
    q, k, v = tensors(1, 9, 9, 2, 2)
    out, lse, _, _ = flash_attn_interface._flash_attn_forward(
        q, k, v, 0.0, 0.3, True, 3, 0, 0.0, None, False, keep_first=2
    )
    results = []
    for order in ((None, False), (2, False, None, False)):
        gradients = [torch.empty_like(x) for x in (q, k, v)]
        more = {} if order[0] else dict(keep_first=2)
        head = (out, q, k, v, out, lse, *gradients, 0.0, 0.3, True, 3, 0, 0.0)
        flash_attn_interface._flash_attn_backward(*head, *order, **more)
        results.append(gradients)
    for a, b in zip(*results, strict=True):
        same(a, b)
