"""The backend of vLLM on CUDA tensors: mixed batches in every layout of the cache, and CUDA graphs as vLLM makes them.

vLLM itself where it is installed, else the stand-in of tests/vllm; scripts/check_vllm.py runs a whole engine.
"""

import os
import sys
from contextlib import contextmanager

import torch
from fronts import ROOT, replaced
from scenario import scenario

H, HK, D, SCALE = 8, 2, 64, 0.125
ROWS, SEQUENCES, WIDTH = 48, 4, 16
LAYER = "model.layers.0.self_attn.attn"
SETTINGS = [None, dict(window=20, keep_first=5), dict(window=20, keep_first=5, force_fa_decode=True)]
LAYOUTS = ["side by side, NHD", "side by side, HND", "axis 1, NHD", "axis 1, HND"]


@contextmanager
def made(strobe_settings, mode="FULL_AND_PIECEWISE", layout=LAYOUTS[0], **layer):
    """An engine of one layer, and the oracle's module."""
    # vLLM asks the engine's configuration for the order of its cache where this is not said.
    os.environ.setdefault("VLLM_KV_CACHE_LAYOUT", "NHD")
    folder = ROOT / "tests" / "vllm"
    if str(folder) not in sys.path:
        sys.path += [str(folder), str(folder / "stand_in")]  # an installed vLLM comes first
    import dense
    import engine
    from vllm.config import CUDAGraphMode

    from strobe.vllm import attention
    from strobe.vllm.backend import StrobeBackend

    given = engine.config(strobe_settings, mode=CUDAGraphMode[mode])
    with replaced(attention, "get_current_vllm_config", lambda: given):
        with torch.device("cuda"):  # as vLLM builds a model
            one = engine.Attention(StrobeBackend, LAYER, H, D, SCALE, HK, **layer)
        whole = engine.Engine(StrobeBackend, one, given, H, HK, D, torch.bfloat16, "cuda", 128, layout)
        yield whole, dense


@scenario([dict(layout=layout, settings=s) for layout in LAYOUTS for s in SETTINGS])
def mixed_batches(strobe, layout, settings):
    """Prompts, chunks and decoding in one call; NaN in every slot that nobody has written."""
    with made(settings, layout=layout) as (engine, dense):
        batches = ({"a": 70}, {"a": 1, "b": 33}, {"c": 5, "a": 1, "d": 128}, {"b": 1, "a": 1, "c": 17, "d": 1})
        for n, batch in enumerate(batches):
            query, output = engine.step(batch, spare_rows=3 * (n % 2))
            rows = sum(batch.values())
            expected = engine.expected(batch, query[:rows], SCALE, **(settings or {}))
            dense.check(output[:rows], expected)
            assert (output[rows:] == 7).all(), "a row of nobody was written"


@scenario([dict(name=name) for name in ("sinks", "softcap", "alibi", "model's window")])
def layers_of_other_models(strobe, name):
    sinks = torch.randn(H).to("cuda", torch.bfloat16)
    slopes = [0.5 ** (n + 1) for n in range(H)]
    layer, expected = {
        "sinks": (dict(sinks=sinks), dict(sinks=sinks)),
        "softcap": (dict(logits_soft_cap=3.0), dict(softcap=3.0)),
        "alibi": (dict(alibi_slopes=slopes), dict(alibi_slopes=torch.tensor(slopes, device="cuda"))),
        "model's window": (dict(sliding_window=20), dict(window=20)),
    }[name]
    with made(None, **layer) as (engine, dense):
        for batch in ({"a": 70}, {"a": 1, "b": 33}):
            query, output = engine.step(batch)
            dense.check(output, engine.expected(batch, query, SCALE, **expected))


class Graph:
    """One layer's update and attention over vLLM's persistent buffers: `rows` rows, `SEQUENCES` sequences."""

    def __init__(self, engine, rows):
        from engine import unified_attention_with_output, unified_kv_cache_update

        self.update, self.attend = unified_kv_cache_update, unified_attention_with_output
        self.engine, self.rows = engine, rows
        engine.kv_cache.nan_to_num_(0.0)  # captured runs read block 0
        self.q, self.k, self.v = engine.inputs(rows)
        self.output = torch.empty_like(self.q)
        names = [f"captured {n}" for n in range(SEQUENCES)]
        self.common = engine.common(dict.fromkeys(names, 1), WIDTH)
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
        self.update(self.engine.layer, self.k, self.v, self.engine.kv_cache, self.metadata.slot_mapping)
        self.attend(self.engine.layer, self.q, self.k, self.v, self.engine.kv_cache, self.metadata, self.output)

    def replay(self, batch):
        """`batch`, padded to what was captured as vLLM pads it: empty sequences, rows of nobody."""
        new, engine = self.engine.common(batch, WIDTH), self.engine
        rows, count = new.num_actual_tokens, new.num_reqs
        for kept, given in zip((self.q, self.k, self.v), engine.inputs(self.rows), strict=True):
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


@scenario([dict(settings=s) for s in SETTINGS])
def one_graph_for_prefill_and_decoding(strobe, settings):
    with made(settings, "FULL") as (engine, dense):
        graph = Graph(engine, ROWS)
        # One row of each was captured: a graph that had kept this as the longest would miss rows of the prompts.
        for batch in (
            {"a": 48},
            {"a": 1, "b": 33},
            {"a": 1, "b": 7, "c": 17, "d": 1},
            {"d": 1, "c": 1, "b": 1, "a": 1},
            {"d": 40, "a": 1},
        ):
            query, output = graph.replay(batch)
            dense.check(output, engine.expected(batch, query, SCALE, **(settings or {})))


@scenario([dict(settings=s) for s in SETTINGS])
def graphs_of_decoding(strobe, settings):
    with made(settings) as (engine, dense):
        graph = Graph(engine, SEQUENCES)
        for batch in ({"a": 70}, {"b": 33, "c": 4}, {"d": 128}):
            query, output = engine.step(batch)
            dense.check(output, engine.expected(batch, query, SCALE, **(settings or {})))
        for batch in ({"a": 1, "b": 1, "c": 1, "d": 1}, {"c": 1, "a": 1}, {"d": 1}, {"b": 1, "c": 1, "a": 1}):
            query, output = graph.replay(batch)
            dense.check(output, engine.expected(batch, query, SCALE, **(settings or {})))
