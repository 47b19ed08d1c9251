"""Finds the four distributions of compat/, installed or beside the tests, and the oracle of tests/py."""

import importlib.util
import pathlib
import sys

import pytest
import torch

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(pathlib.Path(__file__).parent), str(ROOT / "tests" / "py")]
for folder, module in (
    ("flash-attn", "flash_attn_2_cuda"),
    ("flash-attn-vllm", "flash_attn_2_cuda_vllm"),
    ("flex-head-fa", "flex_head_fa_2_cuda"),
    ("flash-attn-3", "flash_attn_interface"),
):
    if importlib.util.find_spec(module) is None:
        sys.path.append(str(ROOT / "compat" / folder))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
