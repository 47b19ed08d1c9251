"""What is installed here, and which function Transformers, SDPA and vLLM really call in this environment.

Needs nothing but Python: `python <folder of strobe>/doctor.py` also works where `import strobe` fails. What has to be
imported to be known is imported by processes of their own, so that one that crashes or hangs is a line of the report.
"""

import argparse
import contextlib
import ctypes
import glob
import importlib.metadata as metadata
import importlib.util
import inspect
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).absolute().parent
DISTRIBUTIONS = (
    "strobe", "flash-attn", "flash-attn-3", "flash-attn-4", "flash-attn-vllm", "flex-head-fa", "torch", "transformers",
    "vllm", "sglang", "sgl-kernel", "xformers", "kernels", "accelerate", "triton", "jax", "numpy",
    "nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12", "nvidia-cuda-runtime", "nvidia-cudnn-cu13",
)  # fmt: skip
MODULES = ("flash_attn", "flash_attn_interface", "flash_attn_2_cuda", "flash_attn_vllm", "flex_head_fa")
VARIABLES = re.compile(
    r"(STROBE|FLASH_ATTENTION|FA_|VLLM_(ATTENTION|FLASH|PLUGINS)|SGLANG_PLUGINS|CUDA_|LD_LIBRARY_PATH|LD_PRELOAD|OMP_NUM|"
    r"(USE_HUB|LOCAL)_KERNELS|TORCH_(CUDA|COMPILE)|PYTHONPATH|PYTORCH_)"
)
LIBRARIES = re.compile(r"[^/]*(?:strobe|_C\.|libcuda\.|nvrtc|libcudart|libtorch_|libcudnn\.|gomp|iomp|flash_attn)[^/]*")


# Probes. Each runs in a process of its own and returns {line: what}.


def probe_strobe() -> dict:
    import strobe

    found = {"import strobe": f"{strobe.__version__}, {Path(strobe.__file__).parent}"}
    found["CPU engine"] = str(strobe.cpu_isa())
    import torch

    x = torch.randn(1, 3, 1, 8)
    found["a call on the CPU"] = "works" if strobe.flash_attn_func(x, x, x).shape == x.shape else "wrong shape"
    if torch.cuda.is_available():
        x = torch.randn(1, 64, 1, 64, device="cuda", dtype=torch.bfloat16)
        found["a call on the GPU"] = "works" if strobe.flash_attn_func(x, x, x).isfinite().all() else "wrong values"
    return found | loaded_libraries()


def probe_torch() -> dict:
    import torch

    found = {"torch": f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}, {Path(torch.__file__).parent}"}
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for n in range(gpus):
        p = torch.cuda.get_device_properties(n)
        found[f"GPU {n}"] = f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory >> 30} GiB"
    found["GPUs that torch sees"] = str(gpus)
    return found


def probe_sdpa() -> dict:
    import torch
    from torch.nn import attention

    found = {"SDPA on CPU tensors": "torch's own (Strobe is not behind it: call strobe.flash_attn_func)"}
    if not hasattr(attention, "current_flash_attention_impl"):
        found["SDPA and varlen_attn on CUDA tensors"] = (
            f"torch's own: torch {torch.__version__} has no registry to join"
        )
        return found
    current = attention.current_flash_attention_impl()
    kind = "Strobe" if current == "Strobe" else f"torch's own ({current or 'FA2'})"
    found["SDPA (flash) and varlen_attn on CUDA tensors"] = (
        f"{kind}; registered: {', '.join(attention.list_flash_attention_impls())}"
    )
    with contextlib.suppress(Exception):
        from strobe import torch_sdpa

        torch_sdpa.activate()
        found["after strobe.torch_sdpa.activate()"] = str(attention.current_flash_attention_impl())
    return found


def probe_transformers() -> dict:
    import transformers

    found = {"transformers": f"{transformers.__version__}, {Path(transformers.__file__).parent}"}
    from transformers import modeling_flash_attention_utils as flash
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.utils import is_kernels_available

    for version, row in flash.FLASH_ATTENTION_COMPATIBILITY_MATRIX.items():
        name = f"flash_attention_{version}"
        if row["general_availability_check"]():
            found[name] = attempt(lambda: described(flash._lazy_imports(name)[1]))
        elif is_kernels_available():
            found[name] = f"not installed: the hub's {flash.FLASH_ATTN_KERNEL_FALLBACK.get(name)}, by package kernels"
        else:
            owned = attempt(lambda: bool(row["pkg_availability_check"]()))
            found[name] = f"refused: {'no CUDA device' if owned is True else 'the package is not installed'}"

    def ours():
        import strobe.hf

        strobe.hf.register()
        return described(ALL_ATTENTION_FUNCTIONS["strobe"])

    found['strobe, after strobe.hf.register()'] = attempt(ours)  # fmt: skip
    found["sdpa"] = described(ALL_ATTENTION_FUNCTIONS["sdpa"])
    return found


def probe_vllm() -> dict:
    import vllm

    found = {"vllm": f"{vllm.__version__}, {Path(vllm.__file__).parent}"}

    def flash():
        from vllm.v1.attention.backends import fa_utils

        return described(fa_utils.flash_attn_varlen_func)

    def custom():
        from vllm.plugins import load_general_plugins
        from vllm.v1.attention.backends.registry import AttentionBackendEnum

        load_general_plugins()
        return str(AttentionBackendEnum.CUSTOM.get_path())

    found["FLASH_ATTN"] = attempt(flash)
    found["CUSTOM, after the plug-ins"] = attempt(custom)
    return found


PROBES = {
    "strobe": probe_strobe,
    "torch": probe_torch,
    "transformers": probe_transformers,
    "sdpa": probe_sdpa,
    "vllm": probe_vllm,
}


def attempt(function):
    try:
        return function()
    except BaseException as error:
        return f"{type(error).__name__}: {error}".split("\n")[0]


def described(function) -> str:
    """Where a function comes from, and whether Strobe is behind it."""
    function = inspect.unwrap(function)
    module = getattr(function, "__module__", None) or "?"
    owners = metadata.packages_distributions().get(module.partition(".")[0], [])
    ours = module.partition(".")[0] == "strobe" or any(
        re.match(r"strobe\b", need) for owner in owners for need in metadata.requires(owner) or ()
    )
    file = getattr(sys.modules.get(module), "__file__", "?")
    owner = f" of {owners[0]} {metadata.version(owners[0])}" if owners else ""
    return f"{'Strobe' if ours else 'not Strobe'}: {module}.{function.__name__}{owner}, {file}"


def loaded_libraries() -> dict:
    with contextlib.suppress(OSError):
        paths = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/" in line}
        return {f"loaded {Path(p).name}": p for p in sorted(paths) if LIBRARIES.fullmatch(Path(p).name)}
    return {}


# What is known without importing anything.


def system() -> dict:
    found = {"Python": f"{platform.python_version()}, {sys.executable}", "system": platform.platform()}
    with contextlib.suppress(OSError):
        cpu = Path("/proc/cpuinfo").read_text()
        found["CPU"] = re.search(r"model name\s*:\s*(.*)", cpu)[1] + f", {os.cpu_count()} threads"
    with contextlib.suppress(OSError):
        found["NVIDIA driver"] = Path("/proc/driver/nvidia/version").read_text().split("\n")[0].strip()
    found["libcuda"] = attempt(driver_version)
    return found


def driver_version() -> str:
    version = ctypes.c_int()
    if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)):
        return "libcuda.so.1 without a driver"
    return f"libcuda.so.1, CUDA {version.value // 1000}.{version.value % 1000 // 10}"


def packages() -> dict:
    """Versions, and the owner of each module whose name a drop-in takes."""
    found = {}
    for name in DISTRIBUTIONS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    owners = metadata.packages_distributions()
    for name in MODULES:
        spec = attempt(lambda: importlib.util.find_spec(name))
        if spec is not None:
            where = getattr(spec, "origin", None) or spec
            found[f"module {name}"] = f"{where}, of {' and '.join(owners.get(name, ['no distribution']))}"
    return found


def extension() -> dict:
    """The folder of this file: is the extension there, and does the loader take it?"""
    found = {"folder": str(HERE)}
    libraries = sorted(HERE.glob("_C*"))
    if not libraries:
        found["_C"] = "missing: this is a source tree, or the wheel is of another platform; pip install strobe"
    for path in libraries:
        # In a process of its own: a library that does not fit may take its process with it.
        code = "import ctypes, sys; ctypes.PyDLL(sys.argv[1])"
        done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, timeout=60)
        found[path.name] = "loads" if done.returncode == 0 else last_line(done)
    return found


def nvrtc() -> dict:
    """The NVRTC libraries of this Python's packages and of CUDA, newest last; STROBE_NVRTC names one."""
    places = [str(Path(p) / "nvidia/*/lib/libnvrtc.so.*") for p in sys.path]
    root = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    files = sorted({f for p in (*places, f"{root}/lib64/libnvrtc.so.*") for f in glob.glob(p) if ".alt." not in f})
    return {file: attempt(lambda: nvrtc_version(file)) for file in files} or {"NVRTC": "not found"}


def nvrtc_version(file: str) -> str:
    major, minor = ctypes.c_int(), ctypes.c_int()
    ctypes.CDLL(file).nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return f"{major.value}.{minor.value}"


def plugins() -> dict:
    found = {}
    for group in ("vllm.general_plugins", "vllm.platform_plugins", "sglang.srt.plugins"):
        for point in metadata.entry_points(group=group):
            found[f"{group} {point.name}"] = point.value
    return found


def last_line(done) -> str:
    lines = [line.strip() for line in (done.stderr or "").strip().splitlines() if line.strip()]
    how = f"ended by signal {-done.returncode}" if done.returncode < 0 else f"exit status {done.returncode}"
    return f"fails: {lines[-1] if lines else how}"


def probed(name: str, timeout: float) -> dict:
    if importlib.util.find_spec("torch" if name == "sdpa" else name) is None:
        return {name: "not installed"}
    command = [sys.executable, str(Path(__file__).absolute()), "--probe", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return {f"import {name}": f"fails: no answer in {timeout:.0f} s"}
    answer = re.search(r"^strobe-doctor (\{.*\})$", done.stdout, re.M)
    return json.loads(answer[1]) if done.returncode == 0 and answer else {f"import {name}": last_line(done)}


def report(timeout: float = 120) -> dict:
    """{section: {line: what}}."""
    variables = {name: value for name, value in sorted(os.environ.items()) if VARIABLES.match(name)}
    return {
        "system": attempt_dict(system),
        "packages": attempt_dict(packages),
        "Strobe": attempt_dict(extension) | probed("strobe", timeout),
        "NVRTC": attempt_dict(nvrtc),
        "torch": probed("torch", timeout),
        "what SDPA calls": probed("sdpa", timeout),
        "what Transformers calls": probed("transformers", timeout),
        "what vLLM calls": probed("vllm", timeout) | attempt_dict(plugins),
        "environment": variables,
    }


def attempt_dict(function) -> dict:
    answer = attempt(function)
    return answer if isinstance(answer, dict) else {function.__name__: answer}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--timeout", type=float, default=120, help="seconds that one import may take")
    parser.add_argument("--probe", choices=PROBES, help=argparse.SUPPRESS)


def run(options: argparse.Namespace) -> int:
    if options.probe:
        print("strobe-doctor", json.dumps(PROBES[options.probe]()))
        return 0
    found = report(options.timeout)
    if options.json:
        print(json.dumps(found, indent=1))
        return 0
    for section, lines in found.items():
        print(f"\n{section}")
        for name, what in lines.items():
            print(f"  {name}: {what}")
    return 0


def main(arguments: list[str] | None = None) -> int:
    # As a script, this file's folder comes first on the path, and its modules have names of other packages.
    own = {HERE.resolve(), Path(__file__).resolve().parent}
    sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() not in own]
    parser = argparse.ArgumentParser(prog="strobe doctor", description=__doc__)
    add_arguments(parser)
    return run(parser.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
