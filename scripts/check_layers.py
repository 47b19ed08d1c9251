"""Checks the rules of the tree that a compiler does not: who may include what, and how long a file may be."""

import re
import subprocess
import sys
from pathlib import Path

MAX_LINES = 500
# (files, pattern that must not occur, why)
RULES = [
    ("src/core/", r"#include <", "src/core is freestanding: no standard, CUDA or torch header"),
    ("src/host/", r"#include .*(torch|cuda|Python\.h)", "src/host knows no torch, CUDA or Python"),
    ("src/cpu/", r"#include .*(torch|Python\.h)", "src/cpu knows no torch or Python"),
]


def main() -> int:
    listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=True).stdout.split()
    sources = [Path(name) for name in listed if name.endswith((".h", ".cpp", ".c", ".py"))]
    problems = []
    for path in sources:
        text = path.read_text()
        if text.count("\n") > MAX_LINES:
            problems.append(f"{path}: longer than {MAX_LINES} lines")
        for folder, pattern, why in RULES:
            if str(path).startswith(folder) and re.search(pattern, text):
                problems.append(f"{path}: {why}")
    print("\n".join(problems) or f"{len(sources)} files keep the layer rules")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
