"""The receipt of the GPU tests: what another machine saw is added to it, and only where it is of the same sources."""

import json
import pathlib
import sys

import pytest

sys.path.append(str(pathlib.Path(__file__).resolve().parents[2] / "scripts"))
import receipt


@pytest.fixture
def files(tmp_path):
    """Paths of a receipt and of a part, written with the given changes to the part."""

    def make(**changes):
        whole = dict(
            sources="abc", devices=1, counts=dict(passed=4000, failed=0, skipped=2, refused=7),
            kinds=dict(scenario=dict(passed=30, skipped=2)), skipped=["a.two: one GPU", "b.other {'n': 1}: no memory"],
        )  # fmt: skip
        part = dict(sources="abc", devices=2, passed=["a.two", "c.both"], failed=0, seconds=20.0) | changes
        paths = tmp_path / "receipt.json", tmp_path / "part.json"
        for path, content in zip(paths, (whole, part), strict=True):
            path.write_text(json.dumps(content))
        return paths

    return make


def test_a_skipped_job_that_passed_elsewhere_is_counted_as_passed(files):
    path, part = files()
    assert receipt.merge(path, part) == 1
    merged = json.loads(path.read_text())
    assert merged["counts"] == dict(passed=4001, failed=0, skipped=1, refused=7)
    assert merged["kinds"]["scenario"] == dict(passed=31, skipped=1)
    assert merged["skipped"] == ["b.other {'n': 1}: no memory"] and merged["devices"] == 1
    assert merged["elsewhere"] == [dict(devices=2, seconds=20.0, passed=["a.two"])]
    assert receipt.merge(path, part) == 0 and json.loads(path.read_text()) == merged  # once


@pytest.mark.parametrize("changes, why", [(dict(sources="abd"), "other sources"), (dict(failed=1), "1 jobs")])
def test_a_part_of_other_sources_or_with_failures_is_refused(files, changes, why):
    path, part = files(**changes)
    before = path.read_text()
    with pytest.raises(SystemExit, match=why):
        receipt.merge(path, part)
    assert path.read_text() == before
