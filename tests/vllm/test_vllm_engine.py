"""Sequences through the backend, prompt by prompt and token by token, against dense attention over their own keys."""

import pytest
import torch
from dense import check
from engine import LAYOUTS, Attention, Engine, config

from strobe.vllm.backend import StrobeBackend

H, HK, D, SCALE = 6, 2, 24, 0.2
LAYER = "model.layers.1.self_attn.attn"
BATCHES = (
    {"a": 40},  # a prompt
    {"a": 1, "b": 33},  # decoding beside a prompt's first chunk
    {"a": 1, "b": 30, "c": 17},
    {"b": 7, "c": 1, "a": 1},  # last chunk; another order
    {"a": 1, "b": 1, "c": 1},
    {"c": 1, "d": 64, "b": 1, "a": 1},  # a prompt that fills its blocks
    {"d": 1, "a": 1},
)
SETTINGS = {
    "full": None,
    "window": dict(window=20),
    "kept tokens": dict(window=20, keep_first=5),
    "full in decoding": dict(window=20, keep_first=5, force_fa_decode=True),
    "this layer is full": dict(window=20, keep_first=5, full_layers=[1]),
}


def run(
    current, settings=None, dtype=torch.float32, batches=BATCHES, spare_rows=0, layout="side by side, NHD", **layer
):
    given = config(settings)
    current(given)
    attention = Attention(StrobeBackend, LAYER, H, D, SCALE, HK, **layer)
    engine = Engine(StrobeBackend, attention, given, H, HK, D, dtype, layout=layout)
    mask = {n: v for n, v in (settings or {}).items() if n != "full_layers"}
    if settings and 1 in settings.get("full_layers", ()):
        mask = {}
    if layer.get("sliding_window"):
        mask = dict(window=layer["sliding_window"])
    options = {"sinks": layer.get("sinks"), "softcap": layer.get("logits_soft_cap") or 0.0}
    if layer.get("alibi_slopes"):
        options["alibi_slopes"] = torch.tensor(layer["alibi_slopes"])
    for batch in batches:
        query, output = engine.step(batch, spare_rows)
        rows = sum(batch.values())
        check(output[:rows], engine.expected(batch, query[:rows], SCALE, **mask, **options))
        assert (output[rows:] == 7).all()
    return engine


@pytest.mark.parametrize("name", SETTINGS)
def test_prefill_and_decode_in_one_call(current, name):
    run(current, SETTINGS[name])


def test_another_mask_would_be_noticed(current):
    """That the test above can fail: kept tokens and window in decoding, where the oracle sees all keys."""
    engine = run(current, SETTINGS["kept tokens"], batches=({"a": 40},))
    query, output = engine.step({"a": 1})
    with pytest.raises(AssertionError, match="not close"):
        check(output, engine.expected({"a": 1}, query, SCALE))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_of_the_cache(current, layout):
    run(current, SETTINGS["full in decoding"], layout=layout)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit(current, dtype):
    run(current, SETTINGS["full in decoding"], dtype)


def test_a_padded_batch(current):
    run(current, SETTINGS["full in decoding"], spare_rows=5)


def test_a_layer_with_a_window_of_its_own(current):
    run(current, sliding_window=20)


def test_sinks_softcap_and_alibi(current):
    run(current, sinks=torch.randn(H), logits_soft_cap=5.0, alibi_slopes=torch.rand(H).tolist())
