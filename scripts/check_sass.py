"""Checks instructions of Hopper kernels, without a GPU, that neither a warning nor a wrong result tells of.

The exponentials of a tile must stand between the wait for its scores and the wait for the output, else nothing runs
under the multiplication by V; Configs without overlap wait for each multiplication alone. And no tensor copy may stand
in a loop over lanes, which the compiler builds where it does not know that one lane alone comes there (ptx::elect).

usage: check_sass.py [--share 1.0] CUBIN...     needs nvdisasm (pip install nvidia-cuda-nvdisasm, or a CUDA toolkit)
"""

import argparse
import itertools
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

OVERLAP = re.compile(rb"fwd_sm90\{.*?overlap=(\d)")
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)([^;]*);")
LANE_LOOP = "BRA.U.ANY"  # ends a loop over lanes around an instruction that takes uniform registers
# What the loop's order is made of.
SCORES_WAIT, OUTPUT_WAIT, EXPONENTIAL, MULTIPLY = "scores", "output", "ex2", "gemm"


def find_nvdisasm() -> str:
    beside = (Path(site) / "nvidia/cu13/bin/nvdisasm" for site in sys.path)
    found = shutil.which("nvdisasm") or next((str(file) for file in beside if file.exists()), None)
    return found or sys.exit("check_sass.py: there is no nvdisasm: pip install nvidia-cuda-nvdisasm")


def disassemble(nvdisasm: str, cubin: Path) -> list[tuple[str, str]]:
    """The instructions of an image, or of a file of the kernel cache, where the image follows a header."""
    content = cubin.read_bytes()
    with tempfile.NamedTemporaryFile(suffix=".cubin") as image:
        image.write(content[content.index(b"\x7fELF") :])
        image.flush()
        sass = subprocess.run([nvdisasm, "-c", image.name], check=True, capture_output=True, text=True).stdout
    return INSTRUCTION.findall(sass)


def overlaps(cubin: Path) -> bool:
    """Of a file of the kernel cache, whose header names the Config; of any other image: yes."""
    named = OVERLAP.search(cubin.read_bytes())
    return not named or named[1] == b"1"


def lane_loops(instructions: list[tuple[str, str]]) -> int:
    return sum(operation == LANE_LOOP for operation, _ in instructions)


def events(instructions: list[tuple[str, str]]) -> list[str]:
    found = []
    for operation, operands in instructions:
        if operation.startswith("WARPGROUP.DEPBAR"):
            found.append(SCORES_WAIT if "0x1" in operands else OUTPUT_WAIT)
        elif operation.startswith("MUFU.EX2"):
            found.append(EXPONENTIAL)
        elif operation.startswith("HGMMA"):
            found.append(MULTIPLY)
    return found


def shares(found: list[str]) -> list[float]:
    """Of each loop body: the share of its exponentials that stand before the wait for the output."""
    result = []
    for start, event in enumerate(found):
        if event != SCORES_WAIT:
            continue
        body = list(itertools.takewhile(lambda e: e not in (SCORES_WAIT, MULTIPLY), found[start + 1 :]))
        under = body[: body.index(OUTPUT_WAIT)] if OUTPUT_WAIT in body else body
        result.append(under.count(EXPONENTIAL) / max(1, body.count(EXPONENTIAL)))
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=1.0)
    parser.add_argument("cubins", nargs="+", type=Path)
    options = parser.parse_args()
    nvdisasm = find_nvdisasm()
    failed = 0
    for cubin in options.cubins:
        instructions = disassemble(nvdisasm, cubin)
        if loops := lane_loops(instructions):
            failed += 1
            print(f"{cubin.name}: {loops} copies stand in loops over lanes FAILED")
        order = events(instructions)
        if not overlaps(cubin):
            bad = SCORES_WAIT in order
            failed += bad
            print(f"{cubin.name}: nothing overlaps{', but something is left pending FAILED' if bad else ''}")
            continue
        found = shares(order)
        bad = not found or min(found) < options.share
        failed += bad
        text = ", ".join(f"{share:.2f}" for share in found) or "no loop was found"
        print(f"{cubin.name}: exponentials before the wait for the output: {text}{' FAILED' if bad else ''}")
    return failed != 0


if __name__ == "__main__":
    sys.exit(main())
