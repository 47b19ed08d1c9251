"""The command `strobe`: `strobe compile` builds kernels ahead of time, for GPUs that need not be here; `strobe show`
says what a call would run; `strobe doctor` says what is installed and which function each framework calls."""

import argparse
import ctypes
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent


class _Kernel(ctypes.Structure):
    """strobe_kernel of strobe.h."""

    _fields_ = [
        ("name", ctypes.c_char_p),
        ("file", ctypes.c_char_p),
        *(
            (field, ctypes.c_int32)
            for field in ("arch", "cached", "registers", "stack_bytes", "spill_bytes", "smem_bytes")
        ),
        ("seconds", ctypes.c_double),
        ("log", ctypes.c_char_p),
    ]


_VISITOR = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.POINTER(_Kernel))


@dataclass(frozen=True)
class Kernel:
    """A kernel of a call, and what the compiler said of it. `cached`: the folder had it; nothing else is known then."""

    name: str
    file: str
    arch: int
    cached: bool
    registers: int
    stack_bytes: int
    spill_bytes: int
    smem_bytes: int
    seconds: float
    log: str


def find_nvrtc() -> None:
    """Names NVRTC's folder among Python's packages to the library, which also looks beside itself and torch."""
    if "STROBE_NVRTC" in os.environ:
        return
    for site in map(Path, sys.path):
        for library in sorted(site.glob("nvidia/*/lib/libnvrtc.so.*"), reverse=True):
            os.environ["STROBE_NVRTC"] = str(library)
            return


def load_library(path: Path | None = None) -> ctypes.CDLL:
    library = ctypes.CDLL(str((path or next(HERE.glob("_C*.so"))).resolve()))
    library.strobe_compile.argtypes = [ctypes.c_char_p, ctypes.c_int32, ctypes.c_char_p, _VISITOR, ctypes.c_void_p]
    library.strobe_compile.restype = ctypes.c_int32
    library.strobe_explain.argtypes = [ctypes.c_char_p, ctypes.c_int32, ctypes.c_char_p, ctypes.c_size_t]
    library.strobe_explain.restype = ctypes.c_int32
    library.strobe_last_error.restype = ctypes.c_char_p
    return library


def compile_call(library: ctypes.CDLL, call: str, arch: int, folder: Path) -> list[Kernel]:
    kernels = []

    def visit(_, kernel):
        k = kernel.contents
        kernels.append(
            Kernel(
                *(text.decode() if text else "" for text in (k.name, k.file)),
                k.arch,
                bool(k.cached),
                *(k.registers, k.stack_bytes, k.spill_bytes, k.smem_bytes, k.seconds),
                k.log.decode(errors="replace") if k.log else "",
            )
        )

    status = library.strobe_compile(call.encode(), arch, os.fsencode(folder), _VISITOR(visit), None)
    if status:
        raise RuntimeError(f"{call}: {library.strobe_last_error().decode()}")
    return kernels


def explain_call(library: ctypes.CDLL, call: str, arch: int) -> str:
    text = ctypes.create_string_buffer(1 << 14)
    if library.strobe_explain(call.encode(), arch, text, len(text)):
        raise ValueError(library.strobe_last_error().decode())
    return text.value.decode()


def calls_of(listed: list[dict]) -> Iterator[str]:
    """The lines of a list file: a field whose value is a list stands for each of its values. head_dim may be "192/128":
    that of Q and K, and that of V."""
    for entry in listed:
        values = [value if isinstance(value, list) else [value] for value in entry.values()]
        for chosen in itertools.product(*values):
            call = dict(zip(entry, chosen))
            head_dim, _, head_dim_v = str(call.get("head_dim", "")).partition("/")
            if head_dim_v:
                call |= {"head_dim": head_dim, "head_dim_v": head_dim_v}
            yield " ".join(f"{name}={value}" for name, value in call.items())


def architectures(text: str) -> list[int]:
    return [int(arch.strip().removesuffix("a")) for arch in text.split(",")]


def compile_list(
    path: Path,
    archs: list[int],
    folder: Path,
    library: ctypes.CDLL,
    jobs: int,
    report: Callable[[Kernel], None],
) -> list[str]:
    """Compiles everything in the list; `report` sees each kernel once. Returns the texts of what failed."""
    work = [(call, arch) for arch in archs for call in calls_of(json.loads(path.read_text()))]
    failures, seen = [], set()
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(compile_call, library, call, arch, folder) for call, arch in work]
        for future in futures:
            try:
                kernels = future.result()
            except RuntimeError as error:
                failures.append(str(error))
                continue
            for kernel in kernels:
                if kernel.file not in seen:
                    seen.add(kernel.file)
                    report(kernel)
    return failures


def main(arguments: list[str] | None = None) -> int:
    from strobe import doctor  # not above: scripts/check_kernels.py imports this file without the package

    parser = argparse.ArgumentParser(prog="strobe", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser("compile", help="compile kernels into a folder, without a GPU")
    build.add_argument("--arch", type=architectures, required=True, help="such as 80,86,89,90a,120")
    build.add_argument("--list", type=Path, default=HERE / "kernels.json", help="the calls to serve (JSON)")
    build.add_argument("--out", type=Path, required=True, help="the folder; STROBE_CACHE_DIR names it at run time")
    build.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    show = commands.add_parser("show", help="the engine, kernels, grid and splits of a call, and why")
    show.add_argument("--arch", type=architectures, required=True, help="such as 90a or 80,120")
    show.add_argument("call", nargs="*", help="such as pass=forward head_dim=192 head_dim_v=128 causal=1")
    doctor.add_arguments(commands.add_parser("doctor", help="what is installed here, and who calls Strobe"))
    options = parser.parse_args(arguments)
    if options.command == "doctor":
        return doctor.run(options)
    if options.command == "show":
        for arch in options.arch:
            try:
                print(f"sm_{arch}\n{explain_call(load_library(), ' '.join(options.call), arch)}", end="")
            except ValueError as refused:
                print(refused, file=sys.stderr)
                return 1
        return 0

    def report(kernel: Kernel) -> None:
        how = "there already" if kernel.cached else f"{kernel.registers} registers, {kernel.seconds:.1f} s"
        print(f"sm_{kernel.arch} {kernel.name}: {how}", flush=True)

    find_nvrtc()
    failures = compile_list(options.list, options.arch, options.out, load_library(), options.jobs, report)
    for failure in failures:
        print(failure, file=sys.stderr)
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
