"""The part of vLLM's engine around attention: pages, block tables, mixed batches, and the calls of a layer.

`Attention` and the two functions behind it make vLLM's calls as its own layer makes them; test_vllm_interface.py holds
the arguments against vLLM's sources.
"""

from types import SimpleNamespace

import torch
from dense import attend
from vllm.config import CUDAGraphMode
from vllm.v1.attention.backend import AttentionType, CommonAttentionMetadata

BLOCK = 16
# (logical shape of the KV cache, order of its dimensions in memory)
LAYOUTS = {
    "side by side, NHD": (lambda blocks, heads, dim: (blocks, heads, BLOCK, 2 * dim), (0, 2, 1, 3)),
    "side by side, HND": (lambda blocks, heads, dim: (blocks, heads, BLOCK, 2 * dim), (0, 1, 2, 3)),
    "axis 1, NHD": (lambda blocks, heads, dim: (blocks, 2, BLOCK, heads, dim), (0, 1, 2, 3, 4)),
    "axis 1, HND": (lambda blocks, heads, dim: (blocks, 2, BLOCK, heads, dim), (0, 1, 3, 2, 4)),
}


def config(strobe=None, layers=2, mode=CUDAGraphMode.FULL_AND_PIECEWISE, **text):
    """A VllmConfig as far as attention reads it."""
    hf = SimpleNamespace(num_hidden_layers=layers, **text)
    return SimpleNamespace(
        additional_config={} if strobe is None else {"strobe": strobe},
        model_config=SimpleNamespace(hf_text_config=hf, max_model_len=4096, rswa_window=None),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
        compilation_config=SimpleNamespace(cudagraph_mode=mode),
        speculative_config=None,
    )


class Attention:
    def __init__(
        self, backend, layer_name, num_heads, head_size, scale, num_kv_heads, alibi_slopes=None, sliding_window=None,
        kv_cache_dtype="auto", logits_soft_cap=None, attn_type=AttentionType.DECODER, **extra_impl_args,
    ):  # fmt: skip
        self.layer_name = layer_name
        self._k_scale = self._v_scale = self._q_scale = torch.tensor(1.0)
        impl_cls = backend.get_impl_cls()
        self.impl = impl_cls(
            num_heads, head_size, scale, num_kv_heads, alibi_slopes, sliding_window, kv_cache_dtype, logits_soft_cap,
            attn_type, None, **extra_impl_args,
        )  # fmt: skip


def unified_kv_cache_update(attn_layer, key, value, kv_cache, layer_slot_mapping):
    attn_layer.impl.do_kv_cache_update(attn_layer, key, value, kv_cache, layer_slot_mapping)


def unified_attention_with_output(self, query, key, value, kv_cache, attn_metadata, output):
    self.impl.forward(
        self, query, key, value, kv_cache, attn_metadata, output=output, output_scale=None, output_block_scale=None
    )


class Engine:
    """Sequences with pages scattered over one cache; every step is one batch of any mix."""

    def __init__(
        self, backend, layer, vllm_config, heads, heads_k, dim, dtype=torch.float32, device="cpu", blocks=64,
        layout="side by side, NHD",
    ):  # fmt: skip
        self.layer, self.backend = layer, backend
        self.heads, self.heads_k, self.dim, self.dtype, self.device = heads, heads_k, dim, dtype, device
        spec = SimpleNamespace(block_size=BLOCK)
        self.builder = backend.get_builder_cls()(spec, [layer.layer_name], vllm_config, torch.device(device))
        shape, order = LAYOUTS[layout][0](blocks, heads_k, dim), LAYOUTS[layout][1]
        # As vLLM makes it: memory in the physical order, seen in the logical one. NaN is what nobody has written.
        raw = torch.full([shape[i] for i in order], float("nan"), dtype=dtype, device=device)
        self.kv_cache = raw.permute([order.index(i) for i in range(len(order))])
        assert self.kv_cache.shape == torch.Size(shape)
        self.free = (torch.randperm(blocks - 1) + 1).tolist()  # block 0 is nobody's
        self.tables, self.keys, self.values = {}, {}, {}

    def random(self, rows, heads):
        return torch.randn(rows, heads, self.dim, device=self.device).to(self.dtype)

    def common(self, batch: dict[str, int], table_width=12) -> CommonAttentionMetadata:
        """Pages for `batch`, rows per sequence, and what vLLM's model runner says of it."""
        slots, starts, lengths, table = [], [0], [], torch.full((len(batch), table_width), -1, dtype=torch.int32)
        for n, (name, rows) in enumerate(batch.items()):
            blocks = self.tables.setdefault(name, [])
            before = self.keys[name].shape[0] if name in self.keys else 0
            while len(blocks) * BLOCK < before + rows:
                blocks.append(self.free.pop())
            slots += [blocks[i // BLOCK] * BLOCK + i % BLOCK for i in range(before, before + rows)]
            table[n, : len(blocks)] = torch.tensor(blocks)
            starts.append(starts[-1] + rows)
            lengths.append(before + rows)

        def int32(values):
            return torch.tensor(values, dtype=torch.int32, device=self.device)

        return CommonAttentionMetadata(
            query_start_loc=int32(starts),
            query_start_loc_cpu=torch.tensor(starts, dtype=torch.int32),
            seq_lens=int32(lengths),
            num_reqs=len(batch),
            num_actual_tokens=starts[-1],
            max_query_len=max(batch.values()),
            max_seq_len=max(lengths),
            block_table_tensor=table.to(self.device),
            slot_mapping=torch.tensor(slots, device=self.device),
        )

    def inputs(self, rows):
        return self.random(rows, self.heads), self.random(rows, self.heads_k), self.random(rows, self.heads_k)

    def remember(self, batch, key, value):
        at = 0
        for name, rows in batch.items():
            for store, new in ((self.keys, key), (self.values, value)):
                part = new[at : at + rows].clone()
                store[name] = torch.cat([store[name], part]) if name in store else part
            at += rows

    def step(self, batch: dict[str, int], spare_rows=0):
        """Runs one batch; query and output. Rows behind its end are there as in a padded batch."""
        common = self.common(batch)
        query, key, value = self.inputs(common.num_actual_tokens + spare_rows)
        metadata = self.builder.build(0, common)
        unified_kv_cache_update(self.layer, key, value, self.kv_cache, common.slot_mapping)
        self.remember(batch, key, value)
        output = torch.full_like(query, 7.0)
        unified_attention_with_output(self.layer, query, key, value, self.kv_cache, metadata, output)
        return query, output

    def expected(self, batch, query, scale, **options):
        at, parts = 0, []
        for name, rows in batch.items():
            parts.append(attend(query[at : at + rows], self.keys[name], self.values[name], scale, **options)[0])
            at += rows
        return torch.cat(parts)
