"""The backend as vLLM asks it: what it supports, its registration, and the metadata of a batch."""

from types import SimpleNamespace

import pytest
import torch
from engine import Attention, Engine, config
from vllm.config import CUDAGraphMode
from vllm.v1.attention.backend import AttentionBackend, AttentionCGSupport, AttentionType
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend

import strobe.vllm
from strobe.vllm.attention import StrobeImpl
from strobe.vllm.backend import StrobeBackend, StrobeMetadataBuilder

LAYER = "model.layers.0.self_attn.attn"


@pytest.fixture
def registry():
    AttentionBackendEnum.CUSTOM.clear_override()
    yield AttentionBackendEnum.CUSTOM
    AttentionBackendEnum.CUSTOM.clear_override()


def test_registered_under_the_name_that_the_backend_gives(registry):
    assert strobe.vllm.register() and strobe.vllm.register()  # every process of vLLM does it, some twice
    assert registry.get_path() == f"{StrobeBackend.__module__}.{StrobeBackend.__qualname__}"
    assert AttentionBackendEnum[StrobeBackend.get_name()] is registry


def test_another_plug_in_keeps_custom(registry, caplog):
    register_backend(registry, "another.Backend")
    assert not strobe.vllm.register()
    assert registry.get_path() == "another.Backend" and "another.Backend" in caplog.text
    assert strobe.vllm.register(replace=True)
    assert registry.get_path() == strobe.vllm.BACKEND


def test_a_vllm_that_strobe_does_not_know_goes_on(monkeypatch, caplog):
    monkeypatch.setitem(__import__("sys").modules, "vllm.v1.attention.backends.registry", None)
    assert not strobe.vllm.register()
    assert "no registry" in caplog.text


def reasons(**given):
    asked = dict(
        head_size=128, dtype=torch.bfloat16, kv_cache_dtype="auto", block_size=16, use_mla=False, has_sink=False,
        use_sparse=False, use_mm_prefix=False, use_per_head_quant_scales=False,
        device_capability=SimpleNamespace(major=8, minor=0), attn_type=AttentionType.DECODER,
    )  # fmt: skip
    return StrobeBackend.validate_configuration(**asked | given)


@pytest.mark.parametrize(
    "given",
    [
        {},
        dict(head_size=40),
        dict(head_size=576),
        dict(dtype=torch.float16, kv_cache_dtype="float16"),
        dict(block_size=48),
        dict(has_sink=True),  # also on sm_80
    ],
)
def test_supported(given):
    assert reasons(**given) == []
    assert StrobeBackend.supports_sliding_window()


@pytest.mark.parametrize(
    "given",
    [
        dict(head_size=100),
        dict(dtype=torch.float32),
        dict(kv_cache_dtype="fp8"),
        dict(kv_cache_dtype="float16"),  # of a bfloat16 model
        dict(block_size=24),
        dict(use_mla=True),
        dict(use_sparse=True),
        dict(use_mm_prefix=True),
        dict(use_non_causal=True),
        dict(use_batch_invariant=True),
        dict(device_capability=SimpleNamespace(major=7, minor=5)),
        dict(attn_type=AttentionType.ENCODER_ONLY),
    ],
)
def test_not_supported(given):
    assert len(reasons(**given)) == 1


def engine(current, given=None, **layer):
    given = given or config()
    current(given)
    attention = Attention(StrobeBackend, LAYER, 4, 16, 0.25, 2, **layer)
    return Engine(StrobeBackend, attention, given, 4, 2, 16)


def test_the_cache_is_laid_out_as_vllm_lays_it_out():
    ask = dict(num_blocks=7, block_size=32, num_kv_heads=3, head_size=40)
    if not hasattr(TritonAttentionBackend, "get_kv_cache_shape"):
        assert "get_kv_cache_shape" not in AttentionBackend.__abstractmethods__, "this vLLM asks no backend"
        return
    shape, order = StrobeBackend.get_kv_cache_shape(**ask), StrobeBackend.get_kv_cache_stride_order()
    assert shape == TritonAttentionBackend.get_kv_cache_shape(**ask)
    assert shape in [(7, 3, 32, 80), (7, 2, 32, 3, 40)]
    assert order == TritonAttentionBackend.get_kv_cache_stride_order()
    layered = StrobeBackend.get_kv_cache_stride_order(include_num_layers_dimension=True)
    assert layered == TritonAttentionBackend.get_kv_cache_stride_order(True) and len(layered) == len(shape) + 1


def test_keys_and_values_are_written_by_a_call_of_their_own():
    assert StrobeBackend.forward_includes_kv_cache_update is False


def test_metadata_of_a_batch(current):
    e = engine(current)
    common = e.common({"a": 5, "b": 20})
    m = e.builder.build(0, common)
    assert (m.num_actual_tokens, m.max_query_len, m.max_seq_len) == (25, 20, 20)
    for ours, theirs in (("query_start_loc",) * 2, ("seq_lens",) * 2, ("block_table", "block_table_tensor")):
        assert getattr(m, ours) is getattr(common, theirs)  # a replayed graph reads vLLM's own buffers
    assert m.slot_mapping is common.slot_mapping


def test_the_block_table_of_another_group(current):
    e = engine(current)
    m = e.builder.build(0, e.common({"a": 5}))
    table, slots = torch.zeros(1, 3, dtype=torch.int32), torch.zeros(5)
    other = e.builder.update_block_table(m, table, slots)
    assert e.builder.supports_update_block_table
    assert other.block_table is table and other.slot_mapping is slots and other.seq_lens is m.seq_lens
    assert m.block_table is not table


def test_no_cascade(current):
    e = engine(current)
    asked = (4096, torch.ones(32).numpy(), 8, 2, False, False, False, 132, 1)
    assert e.builder.use_cascade_attention(*asked) is False
    with pytest.raises(ValueError, match="cascade"):
        e.builder.build(256, e.common({"a": 5}))


@pytest.mark.parametrize(
    "mode, longest",
    [(CUDAGraphMode.FULL, 3), (CUDAGraphMode.FULL_AND_PIECEWISE, 1), (CUDAGraphMode.FULL_DECODE_ONLY, 1)],
)
def test_a_captured_graph_holds_for_what_it_will_be_replayed_with(current, mode, longest):
    e = engine(current, config(mode=mode))
    # Captured with a row of each sequence. A graph of mixed batches is replayed with any lengths that fit its rows.
    m = e.builder.build_for_cudagraph_capture(e.common({"a": 1, "b": 1, "c": 1}))
    assert m.max_query_len == longest
    assert m.max_seq_len == 4096  # max_model_len
    assert StrobeMetadataBuilder.get_cudagraph_support(config(), None) is AttentionCGSupport.ALWAYS


def test_the_profiling_call_gives_zeros_without_a_cache(current):
    e = engine(current)
    query = torch.randn(7, 4, 16)
    output = torch.full_like(query, 7.0)
    result = e.layer.impl.forward(e.layer, query, query, query, torch.tensor([]), None, output)
    assert result is output and not output.any()


def refused(current, match, error=NotImplementedError, given=None, **layer):
    with pytest.raises(error, match=match):
        engine(current, given, **layer)


def test_what_strobe_does_not_have_is_refused(current):
    refused(current, "fp8", kv_cache_dtype="fp8")
    refused(current, "encoder_only", attn_type="encoder_only")
    refused(current, "use_alibi_sqrt", TypeError, use_alibi_sqrt=True)
    refused(current, r"sinks has shape \[3\]", ValueError, sinks=torch.zeros(3))
    for change, match in (
        (lambda c: setattr(c.parallel_config, "decode_context_parallel_size", 2), "decode_context_parallel_size"),
        (lambda c: setattr(c.model_config, "rswa_window", 128), "rswa_window"),
        (lambda c: setattr(c, "speculative_config", object()), "speculative"),
    ):
        given = config(dict(window=8))
        change(given)
        refused(current, match, given=given)

    e = engine(current)
    for change in (dict(causal=False), dict(causal=torch.ones(1)), dict(mm_req_doc_ranges={0: [(0, 3)]})):
        common = e.common({"a": 5})
        for name, value in change.items():
            setattr(common, name, value)
        with pytest.raises(NotImplementedError, match="bidirectional|non-causal"):
            e.builder.build(0, common)
    query = torch.zeros(1, 4, 16)
    with pytest.raises(NotImplementedError, match="head_size 16 of K, 8 of V"):
        e.layer.impl.forward(e.layer, query, query, query[..., :8], e.kv_cache, None, query[..., :8])
    with pytest.raises(NotImplementedError, match="output_scale"):
        e.layer.impl.forward(e.layer, query, query, query, e.kv_cache, None, query, output_scale=torch.ones(1))
    assert StrobeImpl.supports_dcp is False and StrobeImpl.can_return_lse_for_decode is False


def test_a_window_of_the_model_below_a_window_of_strobe_is_an_error_at_start_up(current):
    """Its cache gives away the blocks behind the window, kept tokens among them."""
    e = engine(current, config(dict(window=64, keep_first=4)), sliding_window=32)
    query = torch.zeros(1, 4, 16)
    with pytest.raises(ValueError, match="hf_overrides"):
        e.layer.impl.forward(e.layer, query, query, query, torch.tensor([]), None, query)
