"""Compiles every kernel of the shipped list for every architecture, and for Hopper more that are compiled when a call
first needs them, without a GPU; fails on spills, on stack and on kernels that take long to compile.

usage: check_kernels.py [--arch 80,86,89,90,120] [--list FILE] [--hopper-list FILE] [--library FILE] [--keep FOLDER]
       [--verbose]
Kernels that were found clean stay in the folder; only those whose sources changed are compiled again.
"""

import argparse
import ctypes
import itertools
import json
import math
import os
import re
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "python" / "strobe"))

import cli  # noqa: E402 - without the package, which needs torch and an extension

# Of processor time, where reference_kernel.cu takes REFERENCE_SECONDS, as on the host of an H200 when it was slow;
# elsewhere as many times more as the reference takes there. Machines differ by a factor of 2, and one by 1.6 from
# minute to minute: what seems too slow is compiled again, each time between two references, and its best ratio counts.
MAX_SECONDS = 2.0
REFERENCE_SECONDS = 0.97
TRIES = 5
# (pattern of "sm_90 fwd_sm90{...}", seconds, why it cannot be less); none of them ships
SLOW: list[tuple[str, float, str]] = [
    (
        r"sm_90 fwd_sm90\{.*head_dim_v=192, block_m=128, block_n=128, .*paged=[1-9]",
        2.6,
        "rows of 192 columns leave from registers: half of the assembler's time. 1.7 to 2.0 s on a faster host",
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


class Reference:
    """A text that never changes, whose seconds say how fast this machine compiles now."""

    def __init__(self) -> None:
        path = Path(os.environ.get("STROBE_NVRTC", "libnvrtc.so"))
        for builtins in path.parent.glob("libnvrtc-builtins.so.*"):  # which NVRTC opens by its name alone
            ctypes.CDLL(str(builtins), ctypes.RTLD_GLOBAL)
        self.nvrtc = ctypes.CDLL(str(path))
        self.text = (Path(__file__).parent / "reference_kernel.cu").read_bytes()
        self.numbers = itertools.count()

    def seconds(self) -> float:
        # No text twice: NVRTC may remember one.
        text = self.text.replace(b"reference(", b"reference_%d(" % next(self.numbers))
        program, options = ctypes.c_void_p(), (ctypes.c_char_p * 1)(b"--gpu-architecture=sm_90a")
        start = time.thread_time()
        failed = self.nvrtc.nvrtcCreateProgram(ctypes.byref(program), text, b"reference.cu", 0, None, None)
        failed = failed or self.nvrtc.nvrtcCompileProgram(program, len(options), options)
        taken = time.thread_time() - start
        if failed:
            raise RuntimeError(f"NVRTC does not compile reference_kernel.cu: error {failed}")
        self.nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
        return taken

    def busy_seconds(self, jobs: int) -> float:
        """While so many compile at a time."""
        with ThreadPoolExecutor(jobs) as pool:
            return statistics.median(pool.map(lambda _: self.seconds(), range(3 * jobs)))


def problem_of(kernel: cli.Kernel) -> str | None:
    allowed = exception(ALLOWED, kernel, 0)
    if max(kernel.spill_bytes, kernel.stack_bytes) > allowed:
        return (
            f"{title(kernel)}: {kernel.spill_bytes} bytes of spills, {kernel.stack_bytes} of stack, "
            f"allowed is {allowed}"
        )
    warnings = [line for line in kernel.log.splitlines() if "warning" in line.lower()]
    return f"{title(kernel)}: {warnings[0]}" if warnings else None


def compile_again(
    kernel: cli.Kernel, allowed: float, reference: Reference, calls: list[str], keep: Path, library: ctypes.CDLL
) -> float:
    """What it would take on the machine of REFERENCE_SECONDS: the least of some tries, until one is allowed."""
    least = math.inf
    # The folder has every kernel by now: this only asks which call needs this one.
    asks = (c for c in calls if kernel.file in {k.file for k in cli.compile_call(library, c, kernel.arch, keep)})
    call = next(asks)
    for _ in range(TRIES):
        before = reference.seconds()
        with tempfile.TemporaryDirectory() as folder:
            again = cli.compile_call(library, call, kernel.arch, Path(folder))
        pace = (before + reference.seconds()) / 2
        seconds = min(other.seconds for other in again if other.name == kernel.name)
        least = min(least, seconds * REFERENCE_SECONDS / pace)
        if least <= allowed:
            break
    return least


def marker(file: Path) -> Path:
    return file.with_suffix(".clean")


def main() -> int:
    package = Path(cli.__file__).parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=cli.architectures, default=[80, 86, 89, 90, 120])
    parser.add_argument("--list", type=Path, default=package / "kernels.json")
    parser.add_argument("--hopper-list", type=Path, default=Path(__file__).parent / "hopper_calls.json")
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
        elif kernel.seconds * REFERENCE_SECONDS / pace > exception(SLOW, kernel, MAX_SECONDS):
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
    reference = Reference()
    pace = reference.busy_seconds(options.jobs)
    strobe = cli.load_library(library)
    lists = [(options.list, options.arch)]
    if 90 in options.arch:
        lists.append((options.hopper_list, [90]))
    for path, archs in lists:
        problems += cli.compile_list(path, archs, options.keep, strobe, options.jobs, report)
    calls = [call for path, _ in lists for call in cli.calls_of(json.loads(path.read_text()))]
    for kernel in slow:
        allowed = exception(SLOW, kernel, MAX_SECONDS)
        seconds = compile_again(kernel, allowed, reference, calls, options.keep, strobe)
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
