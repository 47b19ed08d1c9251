"""Checks instructions of Hopper kernels, without a GPU, that neither a warning nor a wrong result tells of.

With overlap, the exponentials of a tile must stand between the wait for its scores and the wait for the output, else
nothing runs under the multiplication by V. Without, a tile's scores are issued right behind the tile before by V, or
each of the two is waited for alone. And no tensor copy may stand in a loop over lanes, which the compiler builds where
it does not know that one lane alone comes there (ptx::elect).

usage: check_sass.py [--share 1.0] CUBIN...     needs nvdisasm (pip install nvidia-cuda-nvdisasm, or a CUDA toolkit)
"""

import argparse
import itertools
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

CONFIG = re.compile(rb"fwd_sm90\{([^}]*)\}")
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


def config_of(cubin: Path) -> dict[str, int]:
    """Of a file of the kernel cache, whose header names it; of any other image, none."""
    named = CONFIG.search(cubin.read_bytes())
    fields = named[1].decode().split(", ") if named else []
    return {name: int(value) for name, value in (field.split("=") for field in fields)}


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


def verdict_alone(found: list[str], products: int) -> tuple[bool, str]:
    """Without overlap: whether, where a multiplication is left pending, both stand together in front of the waits."""
    pending = [n for n, event in enumerate(found) if event == SCORES_WAIT]
    if not pending:
        return True, "each multiplication is waited for"
    both = [MULTIPLY] * products
    apart = sum(found[n - products : n] != both or found[n + 1 : n + 2] != [OUTPUT_WAIT] for n in pending)
    text = f"{products} multiplications together, {len(pending)} times"
    return not apart, f"{text}, {apart} apart" if apart else text


def verdict(nvdisasm: str, share: float, cubin: Path) -> tuple[bool, str]:
    instructions, config = disassemble(nvdisasm, cubin), config_of(cubin)
    if loops := lane_loops(instructions):
        return False, f"{loops} copies stand in loops over lanes"
    found = events(instructions)
    if config and not config["overlap"]:
        return verdict_alone(found, (config["head_dim"] + 15) // 16 + config["block_n"] // 16)
    under = shares(found)
    text = ", ".join(f"{part:.2f}" for part in under) or "no loop was found"
    return bool(under) and min(under) >= share, f"exponentials before the wait for the output: {text}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=1.0)
    parser.add_argument("cubins", nargs="+", type=Path)
    options = parser.parse_args()
    failed = 0
    with ProcessPoolExecutor() as pool:
        verdicts = pool.map(partial(verdict, find_nvdisasm(), options.share), options.cubins)
        for cubin, (good, text) in zip(options.cubins, verdicts):
            failed += not good
            print(f"{cubin.name}: {text}{'' if good else ' FAILED'}")
    return failed != 0


if __name__ == "__main__":
    sys.exit(main())
