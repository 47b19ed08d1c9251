"""Lets the CUDA wheel of vLLM, without its libraries, run on a CPU: a platform plug-in for check_vllm.py --device cpu.

Not for serving. What vLLM's own CPU build has in C++ and this needs is here in a few lines of torch.
"""

import torch
from vllm.platforms.cpu import CpuPlatform


def plugin() -> str:
    return "vllm_on_cpu.Platform"


def _define(schema: str, function) -> None:
    name = schema.split("(")[0]
    library = torch.library.Library("_C", "FRAGMENT")
    library.define(schema)
    if function is not None:
        library.impl(name, function, "CompositeExplicitAutograd")
    _LIBRARIES.append(library)


_LIBRARIES = []


def _slot_mapping(query_start_loc, positions, block_table, slot_mapping, block_size) -> None:
    rows = query_start_loc.diff()
    sequence = torch.repeat_interleave(torch.arange(len(rows)), rows)
    at = positions[: len(sequence)]
    slot_mapping.fill_(-1)
    slot_mapping[: len(sequence)] = block_table[sequence, at // block_size].long() * block_size + at % block_size


class Platform(CpuPlatform):
    @classmethod
    def get_attn_backend_cls(cls, selected_backend, attn_selector_config, num_heads=None):
        return selected_backend.get_path()

    @classmethod
    def import_kernels(cls):
        if not _LIBRARIES:
            _define("init_cpu_memory_env(int[] nodes) -> ()", lambda nodes: None)
            _define("greedy_argmax(Tensor logits) -> Tensor", lambda logits: logits.argmax(-1))
            # Only looked up: with custom_ops "none" the layer uses torch.
            _define("silu_and_mul(Tensor(a!) out, Tensor x) -> ()", None)
            _define(
                "compute_slot_mapping_kernel_impl(Tensor query_start_loc, Tensor positions, Tensor block_table, "
                "Tensor(a!) slot_mapping, int block_size) -> ()",
                _slot_mapping,
            )
