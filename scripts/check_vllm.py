"""Strobe inside a real vLLM engine: greedy tokens of a small random Qwen3 against Transformers with the same weights.

usage: check_vllm.py [--device cpu] [--only NAME ...] [--jobs N]
Needs vLLM 0.26.0, Transformers and an installed Strobe, whose entry point vLLM loads; no network. assemble_vllm.sh
packs vLLM for a machine that cannot install it. Each case is a process of its own: an engine is one per process.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import entry_points
from pathlib import Path

HERE = Path(__file__).resolve().parent
SWAA = {"window": 24, "keep_first": 4, "force_fa_decode": True, "full_layers": [1, 3]}
# strobe: additional_config["strobe"]; the others are arguments of LLM. A prompt in chunks may end in a chunk of one
# token, which counts as decoding: cases with force_fa_decode prefill whole prompts.
CHUNKS = dict(max_num_batched_tokens=64, max_num_seqs=6)
WHOLE = dict(max_num_batched_tokens=256, max_num_seqs=6, enable_chunked_prefill=False)
CASES = {
    "full attention": dict(CHUNKS, enforce_eager=True),
    "window and kept tokens": dict(CHUNKS, enforce_eager=True, strobe=dict(SWAA, force_fa_decode=False)),
    "full attention in decoding": dict(WHOLE, enforce_eager=True, strobe=SWAA),
    "decoding in graphs": dict(CHUNKS, compilation_config={"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}),
    "full attention in decoding, in graphs": dict(
        WHOLE, strobe=SWAA, compilation_config={"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
    ),
    "one graph for prefill and decoding": dict(
        WHOLE, strobe=SWAA, compilation_config={"mode": 0, "cudagraph_mode": "FULL"}
    ),
    "compiled, vLLM's own choice of graphs": dict(WHOLE, strobe=SWAA),
}
ANSWER = 24  # tokens generated
GAP = {"float32": 1e-3, "bfloat16": 0.25, "float16": 0.05}  # logits nearer than this may change places


def prompts() -> list[list[int]]:
    import random

    rng = random.Random(1)
    return [[rng.randrange(512) for _ in range(rng.randrange(20, 120))] for _ in range(14)]


def save_model(folder: str) -> None:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=256, tie_word_embeddings=False,
        initializer_range=0.15,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder)


def add_cpu_platform(folder: str) -> None:
    """vllm_on_cpu.py as an installed plug-in of vLLM, for the processes that follow."""
    info = Path(folder, "vllm_on_cpu-0.dist-info")
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-on-cpu\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[vllm.platform_plugins]\nvllm_on_cpu = vllm_on_cpu:plugin\n")
    os.environ["PYTHONPATH"] = os.pathsep.join([folder, str(HERE), os.environ.get("PYTHONPATH", "")])


def generate(case: dict, folder: str, device: str, dtype: str) -> list[list[int]]:
    """Tokens of vLLM, with Strobe's backend."""
    from vllm import LLM, SamplingParams

    import strobe.vllm.attention as attention

    calls = []
    forward = attention.flash_attn_varlen_func

    def counted(**given):
        calls.append((given["q"].shape[0], given["cu_seqlens_q"].shape[0] - 1, given["max_seqlen_q"]))
        return forward(**given)

    attention.flash_attn_varlen_func = counted
    case = dict(case, kv_cache_memory_bytes=1 << 26, gpu_memory_utilization=0.1)  # several engines fit on one GPU
    strobe = case.pop("strobe", None)
    if device == "cpu":
        case["compilation_config"] = {"custom_ops": ["none"]}  # vLLM's layers in torch
    llm = LLM(
        model=folder, attention_backend="CUSTOM", additional_config={"strobe": strobe} if strobe else {}, dtype=dtype,
        skip_tokenizer_init=True, max_model_len=256, enable_prefix_caching=False, seed=0, **case,
    )  # fmt: skip
    sampling = SamplingParams(temperature=0, max_tokens=ANSWER, detokenize=False, ignore_eos=True)
    given = [{"prompt_token_ids": p} for p in prompts()]
    tokens = [list(o.outputs[0].token_ids) for o in llm.generate(given, sampling, use_tqdm=False)]
    mixed = sum(1 for rows, sequences, longest in calls if 1 < longest and sequences > 1 and rows < longest * sequences)
    print(f"{len(calls)} calls of Strobe, {mixed} of them with sequences of different lengths", file=sys.stderr)
    if not calls or (case.get("enforce_eager") and not mixed):  # a replayed graph makes no call
        raise SystemExit("the engine did not go through Strobe with a mixed batch")
    return tokens


def expected(case: dict, folder: str, tokens: list[list[int]], dtype: str = "float32"):
    """Per prompt the logits of Transformers' eager attention, given the tokens so far; the mask written out."""
    import torch
    from transformers import DynamicCache, Qwen3ForCausalLM

    model = Qwen3ForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=getattr(torch, dtype)).eval()
    strobe = case.get("strobe") or {}

    def mask(rows, keys, full):
        i, j = torch.arange(keys - rows, keys)[:, None], torch.arange(keys)[None]
        seen = j <= i
        if not full:
            seen = seen & ((i - j < strobe["window"]) | (j < strobe["keep_first"]))
        return torch.where(seen, 0.0, -torch.inf).to(model.dtype)[None, None]

    masks = {}

    def of_layer(number):
        def before(module, args, kwargs):
            kwargs["attention_mask"] = masks["full" if number in strobe.get("full_layers", ()) else "windowed"]
            return args, kwargs

        return before

    for number, layer in enumerate(model.model.layers):
        layer.self_attn.register_forward_pre_hook(of_layer(number), with_kwargs=True)
    for prompt, answer in zip(prompts(), tokens):
        cache, logits = DynamicCache(), []
        for step in (prompt, *([t] for t in answer[:-1])):
            keys = cache.get_seq_length() + len(step)
            masks["full"] = mask(len(step), keys, True)
            decode = len(step) == 1 and strobe.get("force_fa_decode")
            masks["windowed"] = mask(len(step), keys, not strobe or decode)
            with torch.no_grad():
                logits.append(model(torch.tensor([step]), past_key_values=cache).logits[0, -1])
        yield torch.stack(logits).float()


def compare(case: dict, folder: str, tokens: list[list[int]], dtype: str) -> None:
    """Every token is the best one or, in a half type, near it: at most twice as often as Transformers in that type."""
    equal = near = theirs = 0
    both = zip(expected(case, folder, tokens), expected(case, folder, tokens, dtype), strict=True)
    for n, (answer, (logits, rounded)) in enumerate(zip(tokens, both, strict=True)):
        if len(answer) != ANSWER:
            raise SystemExit(f"prompt {n}: {len(answer)} tokens instead of {ANSWER}")
        theirs += (rounded.argmax(-1) != logits.argmax(-1)).sum().item()
        for step, (token, row) in enumerate(zip(answer, logits)):
            behind = (row.max() - row[token]).item()
            if behind > GAP[dtype]:
                raise SystemExit(f"prompt {n}, token {step}: {token} is {behind:.3f} behind {row.argmax().item()}")
            equal += behind == 0
            near += behind > 0
    print(f"{equal} tokens equal, {near} within {GAP[dtype]} of the best; Transformers: {theirs}", file=sys.stderr)
    if near > 2 * theirs:
        raise SystemExit("too many tokens differ")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--dtype", choices=list(GAP))
    parser.add_argument("--only", nargs="*", help="names of cases")
    parser.add_argument("--jobs", type=int, default=1, help="cases at a time")
    parser.add_argument("--case", help=argparse.SUPPRESS)  # JSON: this process runs one
    parser.add_argument("--model", help=argparse.SUPPRESS)
    args = parser.parse_args()
    dtype = args.dtype or {"cuda": "bfloat16", "cpu": "float32"}[args.device]
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the engine in this process, where calls are counted
    # Its sampler would import flashinfer, which the packed vLLM has not.
    os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_USE_FLASHINFER_SAMPLER": "0"}
    if args.case:
        case = json.loads(args.case)
        compare(case, args.model, generate(case, args.model, args.device, dtype), dtype)
        return 0
    if not any(e.value.startswith("strobe.vllm") for e in entry_points(group="vllm.general_plugins")):
        raise SystemExit("no entry point of Strobe in vllm.general_plugins: install Strobe's wheel")
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        save_model(folder)
        if args.device == "cpu":
            add_cpu_platform(folder)

        def run(name: str):
            more = ["--device", args.device, "--dtype", dtype, "--model", folder, "--case", json.dumps(CASES[name])]
            # Engines side by side do not fight for processors.
            threads = str(max(1, (os.cpu_count() or 1) // args.jobs))
            environment = {**os.environ, "OMP_NUM_THREADS": threads} if args.jobs > 1 else None
            command = [sys.executable, __file__, *more]
            return name, subprocess.run(command, capture_output=True, text=True, env=environment)

        wanted = [name for name in args.only or CASES if args.device != "cpu" or CASES[name].get("enforce_eager")]
        print("".join(f"not run on a CPU: {name}\n" for name in args.only or CASES if name not in wanted), end="")
        with ThreadPoolExecutor(args.jobs) as pool:
            for name, done in pool.map(run, wanted):
                said = [line for line in done.stderr.split("\n") if "Strobe," in line or "tokens equal" in line]
                print(f"{'passed' if done.returncode == 0 else 'FAILED'}: {name} ({'; '.join(said)})", flush=True)
                if done.returncode:
                    failed.append(name)
                    print("\n".join((done.stdout + done.stderr).split("\n")[-40:]), flush=True)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
