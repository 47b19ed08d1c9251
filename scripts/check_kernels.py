"""Compiles every kernel of the shipped list for every architecture, without a GPU; fails on spills, on stack and on
kernels that take long to compile.

usage: check_kernels.py [--arch 80,86,89,90,120] [--list FILE] [--library FILE] [--keep FOLDER] [--verbose]
Kernels that were found clean stay in the folder; only those whose sources changed are compiled again.
"""

import argparse
import ctypes
import json
import os
import re
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "python" / "strobe"))

import cli  # noqa: E402 - without the package, which needs torch and an extension

# Of processor time. What else a machine does makes it longer, never shorter: a kernel that takes more is compiled
# again, and its least time counts.
MAX_SECONDS = 2.0
TRIES = 4
# (pattern, seconds, why it cannot be less)
SLOW: list[tuple[str, float, str]] = [
    (
        r"sm_90 fwd_sm90\{.*head_dim=128, .*softcap=1",
        2.8,
        "tanh of 88 scores a thread, twice, between asynchronous products",
    ),
]
# (pattern of "sm_90 fwd_sm80{...}", most bytes of spills and stack, why it cannot be without)
ALLOWED: list[tuple[str, float, str]] = [
    # 163 KiB hold no tile that is as fast: the scores of 64 x 128 leave 255 registers for two gradients of 64 each.
    (
        r"sm_80 bwd_sm80\{.*head_dim=128, .*stages_q=1, stages_do=2, .*(softcap|dropout)=1",
        32,
        "once a tile of 7,000 cycles",
    ),
    # Five words that never change are read back from the stack; nothing is written there in the loop.
    (r"sm_90 bwd_sm80\{.*head_dim=192, head_dim_v=128, .*stages_q=2, stages_do=2", 44, "once a tile of 9,000 cycles"),
]


def title(kernel: cli.Kernel) -> str:
    return f"sm_{kernel.arch} {kernel.name}"


def exception(table: list[tuple[str, float, str]], kernel: cli.Kernel, rule: float) -> float:
    """What the table allows this kernel, or what the rule allows all others."""
    return max((most for pattern, most, _ in table if re.search(pattern, title(kernel))), default=rule)


def problem_of(kernel: cli.Kernel) -> str | None:
    allowed = exception(ALLOWED, kernel, 0)
    if max(kernel.spill_bytes, kernel.stack_bytes) > allowed:
        return (
            f"{title(kernel)}: {kernel.spill_bytes} bytes of spills, {kernel.stack_bytes} of stack, "
            f"allowed is {allowed}"
        )
    warnings = [line for line in kernel.log.splitlines() if "warning" in line.lower()]
    return f"{title(kernel)}: {warnings[0]}" if warnings else None


def compile_again(kernel: cli.Kernel, allowed: float, calls: list[str], keep: Path, library: ctypes.CDLL) -> float:
    """The least seconds of some more tries, until they are allowed, while nothing else is compiled here."""
    least = kernel.seconds
    # The folder has every kernel by now: this only asks which call needs this one.
    asks = (c for c in calls if kernel.file in {k.file for k in cli.compile_call(library, c, kernel.arch, keep)})
    call = next(asks)
    for _ in range(TRIES - 1):
        if least <= allowed:
            break
        with tempfile.TemporaryDirectory() as folder:
            again = cli.compile_call(library, call, kernel.arch, Path(folder))
        least = min([least, *(other.seconds for other in again if other.name == kernel.name)])
    return least


def marker(file: Path) -> Path:
    return file.with_suffix(".clean")


def main() -> int:
    package = Path(cli.__file__).parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=cli.architectures, default=[80, 86, 89, 90, 120])
    parser.add_argument("--list", type=Path, default=package / "kernels.json")
    parser.add_argument("--library", type=Path, help="libstrobe.so, or the extension of an installed strobe")
    parser.add_argument("--keep", type=Path, default=Path("build/kernels"))
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--verbose", action="store_true")
    options = parser.parse_args()
    found = (file for site in sys.path for file in Path(site).glob("strobe/_C*.so"))
    library = options.library or next(found, None)
    if not library:
        parser.error("strobe is not installed here: install it, or name a --library")

    for file in options.keep.glob("*.cubin"):
        if not marker(file).exists():
            file.unlink()  # not clean, or a run that was cut off
    kernels: list[cli.Kernel] = []
    problems: list[str] = []
    slow: list[cli.Kernel] = []

    def report(kernel: cli.Kernel) -> None:
        kernels.append(kernel)
        if kernel.cached:
            return
        problem = problem_of(kernel)
        if problem:
            problems.append(problem)
        elif kernel.seconds > exception(SLOW, kernel, MAX_SECONDS):
            slow.append(kernel)
        else:
            marker(Path(kernel.file)).touch()
        if options.verbose:
            print(
                f"{title(kernel)}: {kernel.registers} registers, {kernel.spill_bytes} spilled, "
                f"{kernel.stack_bytes} stack, {kernel.smem_bytes} smem, {kernel.seconds:.2f} s",
                flush=True,
            )

    cli.find_nvrtc()
    compiler = cli.load_library(library)
    problems += cli.compile_list(options.list, options.arch, options.keep, compiler, options.jobs, report)
    calls = list(cli.calls_of(json.loads(options.list.read_text())))
    for kernel in slow:
        allowed = exception(SLOW, kernel, MAX_SECONDS)
        seconds = compile_again(kernel, allowed, calls, options.keep, compiler)
        if seconds > allowed:
            problems.append(f"{title(kernel)}: {seconds:.2f} s to compile, allowed is {allowed}")
        else:
            marker(Path(kernel.file)).touch()
    seen = {Path(kernel.file) for kernel in kernels}
    for file in options.keep.glob("*.cubin"):
        if file not in seen:
            file.unlink()
            marker(file).unlink(missing_ok=True)
    longest = max(kernels, key=lambda kernel: kernel.seconds, default=None)
    print("\n".join(sorted(problems)))
    print(
        f"{len(kernels)} kernels, {sum(not kernel.cached for kernel in kernels)} of them compiled now, {len(problems)} "
        f"problems; {len(slow)} compiled again for their time"
        + (f"; the slowest: {longest.seconds:.1f} s, {title(longest)}" if longest else "")
    )
    return bool(problems) or not kernels


if __name__ == "__main__":
    sys.exit(main())
