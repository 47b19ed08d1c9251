"""How many processes the GPU suite has: as many as the processors and the memory of the GPU are enough for."""

import pathlib
import sys

import pytest

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1] / "gpu"))
from gpu_workers import workers


@pytest.mark.parametrize("processors", [1, 4, 16, 32, 256])
@pytest.mark.parametrize("free_gib", [8, 24, 80, 139])
def test_they_fit_into_the_memory(processors, free_gib):
    found = workers(processors, free_gib * 1024)
    assert 2 <= found <= max(2, processors - 1)
    assert max(1, found - 6) * 5.5 <= max(free_gib / 2, 5.5)


def test_every_processor_has_one_where_there_is_room():
    assert workers(16, 139 * 1024) == 15
