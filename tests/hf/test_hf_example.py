"""examples/hf_swaa.py runs, and its training helps."""

import runpy
from pathlib import Path


def test_the_example(tmp_path, capsys):
    example = runpy.run_path(Path(__file__).parents[2] / "examples" / "hf_swaa.py")
    losses = example["main"](tmp_path, steps=24)
    assert list(losses) == ["full attention", "SWAA", "SWAA, trained"]
    assert losses["SWAA"] != losses["full attention"]
    assert losses["SWAA, trained"] < losses["SWAA"] - 0.01
    assert "it writes" in capsys.readouterr().out
