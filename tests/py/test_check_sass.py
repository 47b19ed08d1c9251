"""scripts/check_sass.py, on orders of instructions that are right and wrong."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

from check_sass import (  # noqa: E402
    EXPONENTIAL,
    LANE_LOOP,
    MULTIPLY,
    OUTPUT_WAIT,
    SCORES_WAIT,
    lane_loops,
    shares,
    verdict_alone,
)

FIRST_TILE = [MULTIPLY] * 8 + [OUTPUT_WAIT] + [EXPONENTIAL] * 40
SCORES, OUTPUT = [MULTIPLY] * 8, [MULTIPLY] * 5
JOINED = FIRST_TILE + OUTPUT + SCORES + [SCORES_WAIT, OUTPUT_WAIT] + [EXPONENTIAL] * 40


@pytest.mark.parametrize(
    "found, good",
    [
        (JOINED, True),
        (FIRST_TILE + OUTPUT + [OUTPUT_WAIT] + SCORES + [OUTPUT_WAIT] + [EXPONENTIAL] * 40, True),
        (FIRST_TILE + OUTPUT + [OUTPUT_WAIT] + SCORES + [SCORES_WAIT, OUTPUT_WAIT] + [EXPONENTIAL] * 40, False),
        (FIRST_TILE + OUTPUT + SCORES + [SCORES_WAIT, EXPONENTIAL, OUTPUT_WAIT] + [EXPONENTIAL] * 39, False),
        (JOINED + SCORES[:5] + [SCORES_WAIT, OUTPUT_WAIT], False),
        ([SCORES_WAIT], False),
    ],
)
def test_products_without_overlap_stand_together(found, good):
    assert verdict_alone(found, 13)[0] == good


def test_exponentials_under_the_output():
    wait = [SCORES_WAIT] + [EXPONENTIAL] * 3 + [OUTPUT_WAIT]
    assert shares(SCORES + OUTPUT + wait) == [1.0]
    assert shares(SCORES + OUTPUT + wait + [EXPONENTIAL] + SCORES + OUTPUT + wait) == [0.75, 1.0]
    assert shares(SCORES + OUTPUT + [SCORES_WAIT, OUTPUT_WAIT] + [EXPONENTIAL] * 4) == [0.0]


def test_loops_over_lanes_are_counted():
    assert lane_loops([("ELECT", ""), ("UTMALDG", ""), (LANE_LOOP, "")]) == 1
    assert lane_loops([("UTMALDG", ""), ("BRA", "")]) == 0
