"""Whether strobe.vllm, and what stands in for vLLM in these tests, fit what was read from vLLM's sources."""

import ast
import inspect
import json
import pathlib

import pytest
import vllm_interface

from strobe.vllm import backend, call
from strobe.vllm.attention import StrobeImpl

HERE = pathlib.Path(__file__).parent
RECORDED = json.loads((HERE / "interface.json").read_text())
STOOD_FOR = "0.26.0"
STAND_IN = vllm_interface.read(HERE / "stand_in")
OURS = {
    "AttentionBackend": backend.StrobeBackend,
    "AttentionMetadataBuilder": backend.StrobeMetadataBuilder,
    "AttentionImpl": StrobeImpl,
    "FlashAttentionImpl": StrobeImpl,
}


@pytest.mark.parametrize("kind, name", [(kind, name) for kind in ("signatures", "fields") for name in STAND_IN[kind]])
def test_the_stand_in_has_the_signature_of_vllm(kind, name):
    there = RECORDED[STOOD_FOR][kind][name]
    given = STAND_IN[kind][name]
    if kind == "fields" and name == "AttentionCGSupport":
        assert set(given) == set(there)
    else:
        assert given == there


def test_the_stand_in_has_all_that_strobe_inherits_or_calls():
    # Not there: the flash attention of vLLM, which strobe.vllm.call and StrobeImpl are in place of.
    missing = set(RECORDED[STOOD_FOR]["signatures"]) - set(STAND_IN["signatures"])
    assert missing == {"FlashAttentionImpl.do_kv_cache_update", "flash_attn_varlen_func"}


@pytest.mark.parametrize("name", [n for n in RECORDED[STOOD_FOR]["calls"] if not n.startswith("FlashAttentionImpl")])
def test_the_engine_of_these_tests_calls_as_vllm_calls(name):
    inside, called = name.split(": ")
    tree = ast.parse((HERE / "engine.py").read_text())
    assert vllm_interface.call(vllm_interface.find(tree, inside), called) == RECORDED[STOOD_FOR]["calls"][name]


def _parameters(function, bound: bool) -> list[inspect.Parameter]:
    return list(inspect.signature(function).parameters.values())[bound:]


@pytest.mark.parametrize("version", RECORDED)
@pytest.mark.parametrize("name", [n for n in RECORDED[STOOD_FOR]["signatures"] if n.split(".")[0] in OURS])
def test_what_strobe_overrides_takes_what_each_version_gives(version, name):
    there = RECORDED[version]["signatures"].get(name)
    if there is None:
        assert version != STOOD_FOR
        return
    kind, method = name.split(".")
    if method not in vars(OURS[kind]):
        assert hasattr(OURS[kind], method), "inherited"
        return
    own = inspect.getattr_static(OURS[kind], method)
    ours = _parameters(getattr(OURS[kind], method), bound=inspect.isfunction(own))
    if any(p.kind == p.VAR_KEYWORD for p in ours):
        return  # use_cascade_attention: an answer that depends on nothing
    assert [p.name for p in ours][: len(there)] == [one.split("=")[0] for one in there]
    for parameter, one in zip(ours, there):
        assert parameter.default is not parameter.empty or "=" not in one, f"{one} may be left out"
    assert all(p.default is not p.empty for p in ours[len(there) :])


@pytest.mark.parametrize("version", RECORDED)
def test_the_call_has_the_parameters_of_vllm(version):
    ours = inspect.signature(call.flash_attn_varlen_func).parameters
    there = [one.split("=")[0] for one in RECORDED[version]["signatures"]["flash_attn_varlen_func"]]
    assert set(there) <= set(ours)
    positional = [n for n, p in ours.items() if p.kind == p.POSITIONAL_OR_KEYWORD]
    shared = RECORDED[STOOD_FOR]["signatures"]["flash_attn_varlen_func"]
    assert positional == [one.split("=")[0] for one in shared]
    for one in shared:
        name, _, default = one.partition("=")
        if default and name != "fa_version":
            assert repr(ours[name].default) == default
