"""`strobe compile` builds kernels without a GPU, once, and names what it cannot build."""

import json
import subprocess
import sys

from strobe import cli


def strobe(*arguments):
    return subprocess.run([sys.executable, "-m", "strobe", *map(str, arguments)], capture_output=True, text=True)


def test_calls_of_a_list():
    listed = [
        {"pass": "forward", "head_dim": ["64", "192/128"], "dtype": ["bf16", "f16"]},
        {"pass": "decode", "head_dim": 128},
    ]
    assert list(cli.calls_of(listed)) == [
        "pass=forward head_dim=64 dtype=bf16",
        "pass=forward head_dim=64 dtype=f16",
        "pass=forward head_dim=192 dtype=bf16 head_dim_v=128",
        "pass=forward head_dim=192 dtype=f16 head_dim_v=128",
        "pass=decode head_dim=128",
    ]
    assert cli.architectures("80,86,90a") == [80, 86, 90]


def test_compile_fills_a_folder_once(tmp_path):
    calls = tmp_path / "calls.json"
    calls.write_text(json.dumps([{"pass": "forward", "head_dim": 16, "seqlen_q": 1, "seqlen_k": 16}]))
    out = tmp_path / "kernels"
    arguments = ("compile", "--arch", "80,90a", "--list", calls, "--out", out)
    first = strobe(*arguments)
    assert first.returncode == 0, first.stderr
    lines = first.stdout.splitlines()
    assert [line.split("{")[0] for line in lines] == ["sm_80 fwd_sm80", "sm_90 fwd_sm80"]
    assert all("head_dim=16, head_dim_v=16" in line and " registers, " in line for line in lines)
    files = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert len(files) == 2 and all(path.name.startswith("fwd_sm80-") for path in files)

    again = strobe(*arguments)
    assert again.returncode == 0 and again.stdout.count(": there already") == 2
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == files


def test_compile_names_what_fails(tmp_path):
    calls = tmp_path / "calls.json"
    calls.write_text(json.dumps([{"pass": "forward", "head_dim": "128/264"}, {"pass": "sideways"}]))
    result = strobe("compile", "--arch", "90", "--list", calls, "--out", tmp_path / "kernels")
    assert result.returncode == 1
    assert "the nearest that fit are 128 and 256" in result.stderr
    assert "allowed is pass=forward|backward|decode" in result.stderr
    assert "allowed is one of 80, 86" in strobe("compile", "--arch", "75", "--out", tmp_path / "kernels").stderr


def test_show_says_what_runs_and_why():
    shown = strobe("show", "--arch", "80,90a", "pass=forward", "head_dim=192", "head_dim_v=128", "causal=1")
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.count("fwd_sm80{") == 1 and shown.stdout.count("fwd_sm90{") == 1, shown.stdout
    assert "head_dim=192, head_dim_v=128" in shown.stdout and "engine chosen because" in shown.stdout
    split = strobe("show", "--arch", "80", "pass=decode", "batch=1", "seqlen_k=131072")
    assert "combine{" in split.stdout and "splits of the keys" in split.stdout, split.stdout
    assert "gradients" not in split.stdout
    refused = strobe("show", "--arch", "80", "pass=forward", "head_dim=seven")
    assert refused.returncode == 1 and "strobe_explain: 'head_dim=seven' in the call" in refused.stderr


def test_backend_that_cannot_serve_a_call_is_an_error():
    refused = strobe("show", "--arch", "90", "pass=forward", "backend=sm90", "alibi=1")
    assert refused.returncode == 1 and "backend 'sm90' cannot serve this call because" in refused.stderr
    elsewhere = strobe("show", "--arch", "80", "pass=forward", "backend=sm90")
    assert elsewhere.returncode == 1 and "backend 'sm90' cannot serve this call because" in elsewhere.stderr
