"""Reads vLLM's side of the interface of strobe.vllm out of its sources, as facts for tests/vllm/interface.json.

usage: vllm_interface.py VERSION=FOLDER ...   FOLDER holds vllm/, as a wheel of that version is unpacked
       vllm_interface.py --check VERSION=FOLDER ...   differences from the recorded facts, and exit status 1
Nothing of vLLM is imported.
"""

import ast
import json
import sys
from pathlib import Path

RECORD = Path(__file__).resolve().parent.parent / "tests/vllm/interface.json"

# What Strobe subclasses, overrides, calls or reads: (file, class or function, its methods).
SIGNATURES = (
    ("v1/attention/backend.py", "AttentionBackend", (
        "get_name", "get_impl_cls", "get_builder_cls", "get_supported_kernel_block_sizes", "get_kv_cache_shape",
        "get_kv_cache_stride_order", "supports_head_size", "supports_sink", "supports_sliding_window",
        "supports_compute_capability", "supports_combination", "supports_dtype", "supports_kv_cache_dtype",
        "supports_block_size", "supports_attn_type", "validate_configuration",
    )),
    ("v1/attention/backend.py", "AttentionMetadataBuilder", (
        "__init__", "build", "build_for_cudagraph_capture", "update_block_table", "use_cascade_attention",
        "get_cudagraph_support",
    )),
    ("v1/attention/backend.py", "AttentionImpl", ("__init__", "forward")),
    ("v1/attention/backends/flash_attn.py", "FlashAttentionImpl", ("do_kv_cache_update",)),
    ("v1/attention/backends/triton_attn.py", "TritonAttentionBackend", (
        "get_kv_cache_shape", "get_kv_cache_stride_order",
    )),
    ("v1/attention/backends/registry.py", "AttentionBackendEnum", ("get_path", "is_overridden")),
    ("v1/attention/backends/registry.py", "register_backend", ()),
    ("config/compilation.py", "CUDAGraphMode", ("mixed_mode",)),
    ("config/vllm.py", "get_current_vllm_config", ()),
    ("_custom_ops.py", "reshape_and_cache_flash", ()),
    ("vllm_flash_attn/flash_attn_interface.py", "flash_attn_varlen_func", ()),
)  # fmt: skip
# Fields of dataclasses and members of enumerations.
FIELDS = (
    ("v1/attention/backend.py", "CommonAttentionMetadata"),
    ("v1/attention/backend.py", "AttentionCGSupport"),
    ("v1/attention/backend.py", "AttentionType"),
    ("config/compilation.py", "CUDAGraphMode"),
)
# How vLLM makes its calls: (file, function, name called).
CALLS = (
    ("model_executor/layers/attention/attention.py", "Attention.__init__", "impl_cls"),
    ("model_executor/layers/attention/attention.py", "unified_attention_with_output", "self.impl.forward"),
    ("model_executor/layers/attention/attention.py", "unified_kv_cache_update", "attn_layer.impl.do_kv_cache_update"),
    ("v1/attention/backends/flash_attn.py", "FlashAttentionImpl.forward", "flash_attn_varlen_func"),
)


def find(tree: ast.AST, path: str):
    """The class or function of a dotted name, or None."""
    for name in path.split("."):
        kinds = ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
        tree = next((n for n in ast.iter_child_nodes(tree) if isinstance(n, kinds) and n.name == name), None)
        if tree is None:
            return None
    return tree


def signature(function: ast.FunctionDef) -> list[str]:
    """Parameters as `name` or `name=default`, without self and cls."""
    a = function.args
    positional = [*a.posonlyargs, *a.args]
    defaults = [None] * (len(positional) - len(a.defaults)) + a.defaults
    pairs = [*zip(positional, defaults)]
    found = [p.arg if d is None else f"{p.arg}={ast.unparse(d)}" for p, d in pairs if p.arg not in ("self", "cls")]
    found += [f"*{a.vararg.arg}"] if a.vararg else ["*"] if a.kwonlyargs else []
    found += [p.arg if d is None else f"{p.arg}={ast.unparse(d)}" for p, d in zip(a.kwonlyargs, a.kw_defaults)]
    return found + ([f"**{a.kwarg.arg}"] if a.kwarg else [])


def fields(node: ast.ClassDef) -> list[str]:
    found = []
    for line in node.body:
        if isinstance(line, ast.AnnAssign):
            found.append(line.target.id if line.value is None else f"{line.target.id}={ast.unparse(line.value)}")
        elif isinstance(line, ast.Assign):
            found.append(f"{line.targets[0].id}={ast.unparse(line.value)}")
    return found


def call(node: ast.AST, name: str) -> list[str] | None:
    """Arguments of the first call of `name`: how they are named there, not what they are."""
    calls = [n for n in ast.walk(node) if isinstance(n, ast.Call) and ast.unparse(n.func) == name]
    if not calls:
        return None
    one = calls[0]
    return ["_"] * len(one.args) + [f"**{ast.unparse(k.value)}" if k.arg is None else f"{k.arg}=" for k in one.keywords]


def read(folder: Path) -> dict:
    def tree(file):
        path = folder / "vllm" / file
        return ast.parse(path.read_text()) if path.exists() else ast.Module([], [])

    facts = {"signatures": {}, "fields": {}, "calls": {}}
    for file, name, methods in SIGNATURES:
        for path in [f"{name}.{m}" for m in methods] or [name]:
            node = find(tree(file), path)
            if node is not None:  # versions differ in what there is
                facts["signatures"][path] = signature(node)
    for file, name in FIELDS:
        node = find(tree(file), name)
        if node is not None:
            facts["fields"][name] = fields(node)
    for file, inside, name in CALLS:
        node = find(tree(file), inside)
        arguments = node and call(node, name)
        if arguments:
            facts["calls"][f"{inside}: {name}"] = arguments
    return facts


def main() -> int:
    check = "--check" in sys.argv
    given = dict(a.split("=", 1) for a in sys.argv[1:] if a != "--check")
    facts = {version: read(Path(folder)) for version, folder in given.items()}
    if not check:
        RECORD.write_text(json.dumps(facts, indent=1) + "\n")
        return 0
    recorded = json.loads(RECORD.read_text())
    different = 0
    for version, kinds in facts.items():
        for kind, names in kinds.items():
            known = recorded.get(version, {}).get(kind, {})
            for name in sorted({*names, *known}):
                if names.get(name) != known.get(name):
                    different += 1
                    print(f"{version} {name}\n  recorded {known.get(name)}\n  there    {names.get(name)}")
    print(f"{len(facts)} versions, {different} differences")
    return bool(different)


if __name__ == "__main__":
    sys.exit(main())
