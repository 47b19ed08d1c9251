"""CUDA graphs over the backend: captured once, replayed with other lengths, other blocks and another mix."""

import pytest
import torch
from dense import check
from engine import Attention, Engine, config, unified_attention_with_output, unified_kv_cache_update
from vllm.config import CUDAGraphMode

from strobe.vllm.backend import StrobeBackend

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
H, HK, D, SCALE = 8, 2, 64, 0.125
LAYER = "model.layers.0.self_attn.attn"
ROWS, SEQUENCES, WIDTH = 48, 4, 16


class Graph:
    """One layer's update and attention over vLLM's persistent buffers: `ROWS` rows, `SEQUENCES` sequences."""

    def __init__(self, engine: Engine, rows_of_each: int, rows: int):
        self.engine, self.rows = engine, rows
        self.q, self.k, self.v = engine.inputs(rows)
        self.output = torch.empty_like(self.q)
        names = [f"captured {n}" for n in range(SEQUENCES)]
        self.common = engine.common({name: rows_of_each for name in names}, WIDTH)
        self.common.num_actual_tokens = rows
        self.common.slot_mapping = torch.full((rows,), -1, device="cuda")
        for name in names:
            engine.free += engine.tables.pop(name)
        self.metadata = engine.builder.build_for_cudagraph_capture(self.common)
        for _ in range(2):  # compiles the kernel, outside of the capture
            self.run()
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.run()

    def run(self):
        unified_kv_cache_update(self.engine.layer, self.k, self.v, self.engine.kv_cache, self.metadata.slot_mapping)
        unified_attention_with_output(
            self.engine.layer, self.q, self.k, self.v, self.engine.kv_cache, self.metadata, self.output
        )

    def replay(self, batch: dict[str, int]):
        """`batch`, padded to what was captured as vLLM pads it: empty sequences, rows of nobody."""
        new, engine = self.engine.common(batch, WIDTH), self.engine
        rows, count = new.num_actual_tokens, new.num_reqs
        for kept, given in zip((self.q, self.k, self.v), engine.inputs(self.rows)):
            kept.copy_(given)
        self.common.query_start_loc[: count + 1] = new.query_start_loc
        self.common.query_start_loc[count + 1 :] = rows
        self.common.seq_lens.zero_()[:count] = new.seq_lens
        self.common.block_table_tensor.zero_()[:count] = new.block_table_tensor
        self.common.slot_mapping.fill_(-1)[:rows] = new.slot_mapping
        engine.remember(batch, self.k[:rows], self.v[:rows])
        self.output.fill_(7.0)
        self.graph.replay()
        return self.q[:rows], self.output[:rows]


def made(current, mode, strobe):
    given = config(strobe, mode=mode)
    current(given)
    layer = Attention(StrobeBackend, LAYER, H, D, SCALE, HK)
    layer._k_scale, layer._v_scale = layer._k_scale.cuda(), layer._v_scale.cuda()
    engine = Engine(StrobeBackend, layer, given, H, HK, D, torch.bfloat16, "cuda", blocks=128)
    engine.kv_cache.nan_to_num_(0.0)  # captured runs read block 0
    return engine


SETTINGS = [None, dict(window=20, keep_first=5), dict(window=20, keep_first=5, force_fa_decode=True)]


@pytest.mark.parametrize("strobe", SETTINGS)
def test_one_graph_for_prefill_and_decoding(current, strobe):
    engine = made(current, CUDAGraphMode.FULL, strobe)
    graph = Graph(engine, rows_of_each=1, rows=ROWS)
    # One row of each was captured: a graph that had kept this as the longest would miss rows of the prompts.
    for batch in (
        {"a": 48},
        {"a": 1, "b": 33},
        {"a": 1, "b": 7, "c": 17, "d": 1},
        {"d": 1, "c": 1, "b": 1, "a": 1},
        {"d": 40, "a": 1},
    ):
        query, output = graph.replay(batch)
        check(output, engine.expected(batch, query, SCALE, **(strobe or {})))


@pytest.mark.parametrize("strobe", SETTINGS)
def test_graphs_of_decoding(current, strobe):
    engine = made(current, CUDAGraphMode.FULL_AND_PIECEWISE, strobe)
    graph = Graph(engine, rows_of_each=1, rows=SEQUENCES)
    for batch in ({"a": 70}, {"b": 33, "c": 4}, {"d": 128}):
        query, output = engine.step(batch)
        check(output, engine.expected(batch, query, SCALE, **(strobe or {})))
    for batch in ({"a": 1, "b": 1, "c": 1, "d": 1}, {"c": 1, "a": 1}, {"d": 1}, {"b": 1, "c": 1, "a": 1}):
        query, output = graph.replay(batch)
        check(output, engine.expected(batch, query, SCALE, **(strobe or {})))
