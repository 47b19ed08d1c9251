"""Compiles every kernel of the shipped list for every architecture, without a GPU; fails on spills and on stack.

usage: check_kernels.py [--arch 80,86,89,90,120] [--list FILE] [--library FILE] [--keep FOLDER] [--verbose]
Kernels that were found clean stay in the folder; only those whose sources changed are compiled again.
"""

import argparse
import os
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "python" / "strobe"))

import cli  # noqa: E402 - without the package, which needs torch and an extension

# What a kernel costs to compile depends on the machine and on what else it does; beyond this it is the kernel.
MAX_SECONDS = 20.0
WANTED_SECONDS = 2.0
# (pattern of "sm_90 fwd_sm80{...}", most bytes of spills and stack, why it cannot be without)
ALLOWED: list[tuple[str, int, str]] = [
    # 163 KiB hold no tile that is as fast: the scores of 64 x 128 leave 255 registers for two gradients of 64 each.
    (
        r"sm_80 bwd_sm80\{.*head_dim=128, .*stages_q=1, stages_do=2, .*(softcap|dropout)=1",
        32,
        "once a tile of 7,000 cycles",
    ),
]


def problem_of(kernel: cli.Kernel) -> str | None:
    name = f"sm_{kernel.arch} {kernel.name}"
    allowed = max((most for pattern, most, _ in ALLOWED if re.search(pattern, name)), default=0)
    if max(kernel.spill_bytes, kernel.stack_bytes) > allowed:
        return f"{name}: {kernel.spill_bytes} bytes of spills, {kernel.stack_bytes} of stack, allowed is {allowed}"
    if kernel.seconds > MAX_SECONDS:
        return f"{name}: {kernel.seconds:.1f} s to compile, allowed is {MAX_SECONDS}"
    warnings = [line for line in kernel.log.splitlines() if "warning" in line.lower()]
    return f"{name}: {warnings[0]}" if warnings else None


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

    def report(kernel: cli.Kernel) -> None:
        kernels.append(kernel)
        if kernel.cached:
            return
        problem = problem_of(kernel)
        if problem:
            problems.append(problem)
        else:
            marker(Path(kernel.file)).touch()
        if options.verbose:
            print(
                f"sm_{kernel.arch} {kernel.name}: {kernel.registers} registers, {kernel.spill_bytes} spilled, "
                f"{kernel.stack_bytes} stack, {kernel.smem_bytes} smem, {kernel.seconds:.2f} s",
                flush=True,
            )

    cli.find_nvrtc()
    problems += cli.compile_list(
        options.list, options.arch, options.keep, cli.load_library(library), options.jobs, report
    )
    seen = {Path(kernel.file) for kernel in kernels}
    for file in options.keep.glob("*.cubin"):
        if file not in seen:
            file.unlink()
            marker(file).unlink(missing_ok=True)
    slow = [kernel for kernel in kernels if kernel.seconds > WANTED_SECONDS]
    longest = max((kernel.seconds for kernel in kernels), default=0.0)
    print("\n".join(sorted(problems)))
    print(
        f"{len(kernels)} kernels, {sum(not kernel.cached for kernel in kernels)} of them compiled now, {len(problems)} "
        f"problems; the slowest took {longest:.1f} s, {len(slow)} more than {WANTED_SECONDS} s"
    )
    return bool(problems) or not kernels


if __name__ == "__main__":
    sys.exit(main())
