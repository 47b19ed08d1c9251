"""What the tests of attention share: calls compared with the oracle under the error rule."""

import pathlib
import sys

import pytest
import torch
from hypothesis import HealthCheck, settings

sys.path.insert(0, str(pathlib.Path(__file__).parent))

settings.register_profile("strobe", deadline=None, suppress_health_check=list(HealthCheck))
settings.load_profile("strobe")


@pytest.fixture(scope="session")
def strobe():
    import strobe

    return strobe


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
