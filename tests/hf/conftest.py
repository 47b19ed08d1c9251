"""What the tests inside Transformers share: small random models, and eager as their oracle."""

import os
import pathlib
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
sys.path.insert(0, str(pathlib.Path(__file__).parent))

import pytest
import torch

import strobe.hf


@pytest.fixture(autouse=True, scope="session")
def _registered():
    strobe.hf.register()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
