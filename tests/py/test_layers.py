"""The tree's rules find what they forbid, and only that: scripts/check_layers.py on bad and good lines."""

import importlib.util
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("check_layers", ROOT / "scripts" / "check_layers.py")
check_layers = importlib.util.module_from_spec(spec)
spec.loader.exec_module(check_layers)

BAD = [
    ("src/core/mask.h", "#include <algorithm>", "freestanding"),
    ("src/core/mask.h", "#include <cuda_runtime.h>", "freestanding"),
    ("src/core/seqlen.h", '#include "host/problem.h"', "nothing but itself"),
    ("src/core/score.h", "  return std::abs(x);", "nothing of std"),
    ("src/host/plan.cpp", "#include <torch/torch.h>", "no torch"),
    ("src/host/driver.h", "#include <cuda.h>", "no torch"),
    ("src/host/driver.h", '#include "cuda_runtime.h"', "no torch"),
    ("src/cpu/forward.h", "#include <ATen/Parallel.h>", "no torch"),
    ("src/cpu/forward.h", "# include <Python.h>", "no torch"),
    ("src/cuda/fwd.cuh", "#include <cuda_bf16.h>", "NVRTC"),
    ("src/cpu/forward.h", "i64 first = mask.row_begin(i) / kBlockN;", "bounds of a row"),
    ("src/cuda/fwd.cuh", "const i64 end = mask.col_end(j);", "bounds of a row"),
    ("src/cpu/forward.h", "i64 tile = (i + mask.off() - left) / kBlockN;", "tile bounds"),
    ("src/cuda/fwd.cuh", "i64 end = ceil_div(keys.kept_end, block_n);", "tile bounds"),
    ("src/cpu/decode.h", "i64 tile = head.mask.keys(i).begin >> 6;", "tile bounds"),
    ("src/cuda/fwd.cuh", "i64 tiles = ceil_div(p.window_left, kBlockN);", "tile bounds"),
    ("src/host/plan.cpp", "tiles = p.window_left / block_n + 2;", "tile bounds"),
    ("src/cpu/decode.h", "float top = -INFINITY;", "made in core/softmax.h"),
    ("src/cpu/decode.h", "float top = -std::numeric_limits<float>::infinity();", "made in core/softmax.h"),
    ("src/cpu/decode.h", "float top = -HUGE_VALF;", "made in core/softmax.h"),
    ("src/core/score.h", "float top = -__builtin_huge_valf();", "made in core/softmax.h"),
    ("src/cpu/decode.h", "if (std::isinf(top)) return;", "made in core/softmax.h"),
    ("src/cuda/apply.cuh", "float top = __uint_as_float(0xff800000);", "made in core/softmax.h"),
    ("src/cpu/decode.h", "float top = -1.0f / 0.0f;", "made in core/softmax.h"),
    ("src/cpu/decode.h", "if (top == kNegInfinity) continue;", "what an infinity means"),
    ("src/cuda/apply.cuh", "if (kInfinity != lse) continue;", "what an infinity means"),
    ("src/cpu/decode.h", "bool seen = top > strobe::kNegInfinity || top > -kInfinity;", "what an infinity means"),
    ("bench/cases.py", "\n" * 501, "longer than 500"),
    ("src/cuda/fwd.cuh", "//\n" * 501, "longer than 500"),
    ("src/cpu/engine.inl", "//\n" * 501, "longer than 500"),
]

GOOD = [
    ("src/core/seqlen.h", '#include "mask.h"'),
    ("src/core/seqlen.h", '#include "core/mask.h"'),
    ("src/core/mask.h", "return i >= full_from ? 0 : row_begin(i) / block_n;"),
    ("src/core/softmax.h", "constexpr float kNegInfinity = -__builtin_huge_valf();"),
    ("src/core/softmax.h", "if (row.max == kNegInfinity) return 0.f;"),
    ("src/core/score.h", "// not std::abs: <cmath> is not there; -INFINITY has no place here"),
    ("src/core/score.h", "/* as in\n   #include <cmath>\n   std::abs */ float x;"),
    ("src/host/plan.cpp", "#include <algorithm>"),
    ("src/host/capi.cpp", '#include "host/cuda_engine.h"'),
    ("src/host/check_options.cpp", 'refuse("allowed is -inf // to INFINITE");'),
    ("src/cpu/forward.h", "for (i64 c = begin; c < end; ++c) s[c] = kNegInfinity;"),
    ("src/cpu/forward.h", "const Walk walk = head.mask.visit(row0, used, kBlockN);"),
    ("src/cpu/forward.h", "part.max[r] = kNegInfinity, part.sum[r] = 0.f;"),
    ("src/cpu/kvcache.cpp", "const bool per_row = p.causal || p.window_left >= 0;"),
    ("src/cpu/backward.h", "tiles += ceil_div(seq.seqlen_q, kQueryTile);"),
    ("python/strobe/x.py", "-math.inf"),
    ("bench/cases.py", "\n" * 500),
]


@pytest.mark.parametrize("name, text, why", BAD, ids=[f"{i}-{why}" for i, (_, _, why) in enumerate(BAD)])
def test_bad(name, text, why):
    problems = check_layers.check_file(name, text, set())
    assert any(why in problem and problem.startswith(name) for problem in problems), problems


@pytest.mark.parametrize("name, text", GOOD, ids=range(len(GOOD)))
def test_good(name, text):
    assert check_layers.check_file(name, text, set()) == []


def test_exceptions_are_of_one_file():
    name, text = check_layers.INFINITY_EXCEPTIONS[0]
    used = set()
    assert check_layers.check_file(name, text, used) == []
    assert used == {(name, text)}
    assert check_layers.check_file("src/host/other.cpp", text, used) != []


def test_line_numbers_survive_comments():
    problems = check_layers.check_file("src/core/mask.h", "/* a\n b */\n\n#include <cmath>", set())
    assert problems == ["src/core/mask.h:4: src/core is freestanding: no standard, CUDA or torch header"]
