"""Strobe's settings of a model in vLLM: where they are found, and what each layer gets."""

import subprocess
import sys

import pytest
from engine import config

from strobe.vllm.settings import NOTHING, Layer, layer_number, of_engine


def test_nothing_asked():
    assert of_engine(config()) is None


def test_of_additional_config_per_layer():
    settings = dict(window=64, keep_first=4, force_fa_decode=[0, 2], full_layers=[1])
    assert of_engine(config(settings, layers=3)) == [Layer(64, 4, True), NOTHING, Layer(64, 4, True)]


def test_swaa_s_names():
    settings = dict(sliding_window_size=64, keep_first=4, force_fa_decode=True, non_sliding_layers=[1])
    assert of_engine(config(settings)) == [Layer(64, 4, True), NOTHING]


def test_saved_with_the_model_and_overruled_by_the_engine():
    saved = dict(window=64, keep_first=4)
    given = config(layers=1)
    given.model_config.hf_text_config.strobe = saved
    assert of_engine(given) == [Layer(64, 4, False)]
    given.additional_config["strobe"] = dict(window=8)
    assert of_engine(given) == [Layer(8, 0, False)]


def test_by_layer_type():
    given = config(dict(window={"full_attention": 32}), layer_types=["sliding_attention", "full_attention"])
    assert of_engine(given) == [NOTHING, Layer(32)]


@pytest.mark.parametrize(
    "settings, error",
    [
        (dict(windows=3), "no setting 'windows'"),
        (dict(window=0), "window is 0"),
        (dict(window=8, full_layers=[7]), r"names layers \[7\]"),
        (dict(window=8, full_layers=[0, 1]), "full_layers names them all"),
        (dict(window=[8]), "lists 1 layers, the model has 2"),
        ("window=8", "takes a dict"),
    ],
)
def test_settings_that_mean_nothing_are_errors(settings, error):
    with pytest.raises((TypeError, ValueError), match=error):
        of_engine(config(settings))


def test_number_of_a_layer():
    assert layer_number("model.layers.13.self_attn.attn") == 13
    for name in ("model.attn", "model.layers.3.blocks.1.attn"):
        with pytest.raises(NotImplementedError, match=name):
            layer_number(name)


def test_vllm_needs_no_transformers():
    program = "import sys; sys.modules['transformers'] = None; import strobe.vllm.settings"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
