"""Checks the rules of the tree that a compiler does not: who includes and computes what, and how long a file may be."""

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

MAX_LINES = 500
SOURCES = (".h", ".hpp", ".cpp", ".c", ".cuh", ".cu", ".inl", ".py", ".sh")
COMMENT = re.compile(r'("(?:\\.|[^"\\\n])*")|//[^\n]*|/\*.*?\*/', re.S)


@dataclass
class Rule:
    where: tuple  # folders
    pattern: str  # that must not occur, in code without comments
    why: str
    home: str = ""  # the one file that may
    exceptions: tuple = ()  # (file, text of the line), each with its reason beside it


# A line of block arithmetic is one that divides; a mask bound is what Mask and Keys are made of.
DIVIDES = r"(?:ceil_div\s*\(|/|%|>>|<<)"
BOUND = r"(?:\bkept_end\b|\bmask\.(?:left|right|keep_first|full_from|keys|queries|off)\b|\bwindow_(?:left|right)\b)"

# What decides about infinities outside of softmax.h, each for a reason.
INFINITY_EXCEPTIONS = (
    # Decoding half-precision bits: a number format, not a rule of the softmax.
    ("src/host/check_options.cpp", "NAN : INFINITY"),
    # rescale() in units of log2, vectorised; the same rule as softmax.h's.
    ("src/cpu/forward.h", "old == kNegInfinity ? 0.f : exp2("),
    ("src/cuda/apply.cuh", "max[r] == kNegInfinity ? 0.f : ptx::ex2("),
    ("src/cuda/epilogue.cuh", "rows.max[r] == kNegInfinity ? 0.f : ptx::ex2("),
    ("src/cuda/epilogue.cuh", "theirs == kNegInfinity ? 0.f : ptx::ex2("),
    # From units of log2 to natural ones: -inf times a negative factor would change its sign.
    ("src/cuda/fwd_sm80.cuh", "rows.max[r] == kNegInfinity ? kNegInfinity : rows.max[r] * to_natural"),
    # The LSE +inf of an empty row, read back: it has no gradient.
    ("src/cpu/backward.h", "p_.lse[at] == kInfinity ? 0.f"),
    ("src/cuda/bwd_pre.cuh", "if (lse != kInfinity)"),
)

RULES = (
    Rule(("src/core/",), r"#\s*include\s*<", "src/core is freestanding: no standard, CUDA or torch header"),
    Rule(("src/core/",), r'#\s*include\s*"(?!(?:core/)?\w+\.h")', "src/core includes nothing but itself"),
    Rule(("src/core/",), r"\bstd::", "src/core is freestanding: nothing of std"),
    Rule(
        ("src/host/", "src/cpu/"),
        r'#\s*include\s*[<"](?:torch|ATen|c10|cuda|nvrtc|cublas|cudnn|cute|cutlass|Python\.h|pybind11)',
        "src/host and src/cpu know no torch, CUDA or Python header",
    ),
    Rule(("src/cuda/",), r"#\s*include\s*<", "NVRTC compiles src/cuda without any header of the system"),
    Rule(
        ("src/",),
        r"\b(?:row|col)_(?:begin|end)\s*\(",
        "the bounds of a row or column are core/mask.h's: use keys(), queries() or a walk",
        home="src/core/mask.h",
    ),
    Rule(
        ("src/",),
        rf"{DIVIDES}[^;\n]*{BOUND}|{BOUND}[^;\n]*{DIVIDES}",
        "tile bounds are computed in core/mask.h only",
        home="src/core/mask.h",
    ),
    Rule(
        ("src/",),
        r"\bINFINITY\b|\bHUGE_VALF?\b|\bhuge_valf?\b|__builtin_(?:inf|huge_val|isinf)|::infinity\s*\(|\bisinf\b"
        r"|(?i:0x(?:7f|ff)800000\b)|[-+]\s*1\.?0?f?\s*/\s*0\.?0?f?\b",
        "infinities are made in core/softmax.h only: use its kInfinity and kNegInfinity",
        home="src/core/softmax.h",
        exceptions=INFINITY_EXCEPTIONS,
    ),
    Rule(
        ("src/",),
        r"(?:==|!=|<=|>=|<|>)\s*-?\s*k(?:Neg)?Infinity\b|\bk(?:Neg)?Infinity\s*(?:==|!=|<=|>=|<|>)",
        "what an infinity means is decided in core/softmax.h only",
        home="src/core/softmax.h",
        exceptions=INFINITY_EXCEPTIONS,
    ),
)


def strip_comments(text: str) -> str:
    """Blanks comments, keeping strings and line numbers."""
    return COMMENT.sub(lambda m: m.group(1) or "\n" * m.group().count("\n"), text)


def check_file(name: str, text: str, used: set) -> list:
    """The problems of one file, as `name:line: why`. Exceptions that were needed are added to `used`."""
    problems = []
    if text.count("\n") > MAX_LINES:
        problems.append(f"{name}: longer than {MAX_LINES} lines")
    if not name.startswith("src/"):
        return problems
    for number, line in enumerate(strip_comments(text).split("\n"), 1):
        for rule in RULES:
            if not name.startswith(rule.where) or name == rule.home or not re.search(rule.pattern, line):
                continue
            excused = {e for e in rule.exceptions if e[0] == name and e[1] in line}
            used |= excused
            if not excused:
                problems.append(f"{name}:{number}: {rule.why}")
    return problems


def main() -> int:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")
    names = sorted(n for n in listed if n.endswith(SOURCES) and Path(n).exists())
    used = set()
    problems = [problem for name in names for problem in check_file(name, Path(name).read_text(), used)]
    problems += [f"{name}: exception not needed: {text}" for name, text in sorted(set(INFINITY_EXCEPTIONS) - used)]
    print("\n".join(problems) or f"{len(names)} files keep the layer rules")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
