"""What the tests of strobe.vllm share. vLLM itself where it is installed, else the stand-in for its interface."""

import os
import pathlib
import sys

# vLLM asks the engine's configuration for the order of its cache where this is not said.
os.environ.setdefault("VLLM_KV_CACHE_LAYOUT", "NHD")

import pytest
import torch

HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent.parent / "scripts")]
sys.path.append(str(HERE / "stand_in"))  # behind everything: an installed vLLM comes first


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def current(monkeypatch):
    """Sets the configuration that vLLM would have while it builds a model."""
    import strobe.vllm.attention as attention

    return lambda config: monkeypatch.setattr(attention, "get_current_vllm_config", lambda: config)
