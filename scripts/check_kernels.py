"""Compiles every kernel of the shipped list for every architecture, and for Hopper more that are compiled when a call
first needs them, without a GPU; fails on spills, on stack, on warnings, on serialized wgmma and on large kernels.

usage: check_kernels.py [--arch 80,86,89,90,120] [--list FILE] [--hopper-list FILE] [--library FILE] [--keep FOLDER]
       [--verbose]
Kernels that were found clean stay in the folder; only those whose sources changed are compiled again.
"""

import argparse
import os
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "python" / "strobe"))

import cli  # noqa: E402 - without the package, which needs torch and an extension

# Of a kernel's image. What is unrolled once too often shows here, and no less where a machine is busy; what a first
# call takes, the suite jit of bench.main measures on a GPU's host.
MAX_BYTES = 120 * 1024
# In a line of the compiler's log. That wgmma is serialized it says as "info ... Potential Performance Loss".
COMPLAINTS = ("warning", "performance loss")
# (pattern of "sm_90 fwd_sm80{...}", most bytes of spills and stack, why it cannot be without)
ALLOWED: list[tuple[str, int, str]] = [
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


def problem_of(kernel: cli.Kernel) -> str | None:
    allowed = max((most for pattern, most, _ in ALLOWED if re.search(pattern, title(kernel))), default=0)
    if max(kernel.spill_bytes, kernel.stack_bytes) > allowed:
        return (
            f"{title(kernel)}: {kernel.spill_bytes} bytes of spills, {kernel.stack_bytes} of stack, "
            f"allowed is {allowed}"
        )
    size = Path(kernel.file).stat().st_size
    if size > MAX_BYTES:
        return f"{title(kernel)}: {size} bytes, allowed are {MAX_BYTES}"
    for line in kernel.log.splitlines():
        if any(word in line.lower() for word in COMPLAINTS):
            return f"{title(kernel)}: {line}"
    return None


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
    kernels: dict[Path, cli.Kernel] = {}  # by file, since the lists share some
    problems: list[str] = []

    def report(kernel: cli.Kernel) -> None:
        file = Path(kernel.file)
        if file in kernels:
            return
        kernels[file] = kernel
        if kernel.cached:
            return
        problem = problem_of(kernel)
        if problem:
            problems.append(problem)
        else:
            marker(file).touch()
        if options.verbose:
            print(
                f"{title(kernel)}: {kernel.registers} registers, {kernel.spill_bytes} spilled, "
                f"{kernel.stack_bytes} stack, {kernel.smem_bytes} smem, {kernel.seconds:.2f} s",
                flush=True,
            )

    cli.find_nvrtc()
    strobe = cli.load_library(library)
    lists = [(options.list, options.arch)]
    if 90 in options.arch:
        lists.append((options.hopper_list, [90]))
    for path, archs in lists:
        problems += cli.compile_list(path, archs, options.keep, strobe, options.jobs, report)
    for file in options.keep.glob("*.cubin"):
        if file not in kernels:
            file.unlink()
            marker(file).unlink(missing_ok=True)
    compiled = [kernel for kernel in kernels.values() if not kernel.cached]
    longest = max(compiled, key=lambda kernel: kernel.seconds, default=None)
    print("\n".join(sorted(problems)))
    print(
        f"{len(kernels)} kernels, {len(compiled)} of them compiled now, {len(problems)} problems"
        + (f"; the slowest: {longest.seconds:.1f} s, {title(longest)}" if longest else "")
    )
    return bool(problems) or not kernels


if __name__ == "__main__":
    sys.exit(main())
