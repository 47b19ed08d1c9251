"""Offsets beyond 2^31 elements, and how much memory a long sequence needs."""

import os
import subprocess
import sys

import pytest
import torch


def run_alone(strobe, program):
    """In a process of its own, so that its peak of resident memory is its own."""
    root = os.path.dirname(os.path.dirname(strobe.__file__))
    path = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=os.environ | dict(PYTHONPATH=path), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("side", ["rows", "batch"])
def test_offsets_beyond_2_to_31(strobe, side):
    """k and v share one tensor of 2^31 + 2^20 elements of which only the pages that are touched become resident."""
    heads, dim = 4, 64
    rows = (2**31 + 2**20) // (heads * dim)
    storage = torch.empty(rows * heads * dim, dtype=torch.bfloat16)
    n = 300
    whole = storage.view(1, rows, heads, dim)
    whole[:, -n:] = torch.randn(1, n, heads, dim)
    q = torch.randn(1, 40, heads, dim).bfloat16()
    expected = strobe.flash_attn_func(q, whole[:, -n:].clone(), whole[:, -n:].clone(), causal=True, window_size=(50, 0))
    if side == "rows":  # one sequence of 8.4 million keys, of which the window sees the last few
        out = strobe.flash_attn_func(q, whole, whole, causal=True, window_size=(50, 0))
    else:  # two sequences whose batch stride is beyond 2^31
        pair = storage.as_strided((2, n, heads, dim), ((rows - n) * heads * dim, heads * dim, dim, 1))
        pair[0] = pair[1]
        assert pair.stride(0) > 2**31 - 2**20 and pair[1].data_ptr() - pair[0].data_ptr() > 2**32
        out = strobe.flash_attn_func(q.expand(2, -1, -1, -1), pair, pair, causal=True, window_size=(50, 0))[1:]
    torch.testing.assert_close(out, expected, rtol=1e-2, atol=1e-2)


def test_paged_offsets_beyond_2_to_31(strobe):
    page_size, heads, dim = 16, 4, 64
    pages = 2**31 // (page_size * heads * dim) + 64
    storage = torch.empty(pages, page_size, heads, dim, dtype=torch.bfloat16)
    table = torch.arange(pages - 3, pages, dtype=torch.int32)[None]
    storage[-3:] = torch.randn(3, page_size, heads, dim)
    q, used = torch.randn(1, 1, heads, dim).bfloat16(), torch.tensor([41], dtype=torch.int32)
    keys = storage[-3:].flatten(0, 1)[None, :41].clone()
    out = strobe.flash_attn_with_kvcache(q, storage, storage, cache_seqlens=used, block_table=table)
    torch.testing.assert_close(out, strobe.flash_attn_func(q, keys, keys), rtol=1e-2, atol=1e-2)


MEMORY = """
import resource, torch, strobe
torch.set_num_threads(2)
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
def train(seqlen):
    leaves = [torch.randn(1, seqlen, 1, 64).bfloat16().requires_grad_() for _ in range(3)]
    dout = torch.randn(1, seqlen, 1, 64).bfloat16()
    before = peak()
    strobe.flash_attn_func(*leaves, causal=True, window_size=(256, 0)).backward(dout)
    return peak() - before
train(256)  # code, threads and the allocator's arenas
print(train(65536))
"""


def test_memory_of_a_long_sequence(strobe):
    """Forward + backward at S = 64k, one head, d 64, bf16: under 64 MB beyond the inputs, by peak resident memory.

    out, lse, dq, dk and dv (34 MB) count as extra here. The window bounds the time only: a score matrix would be 8 GB
    with it or without, and every buffer sized by the sequence is at its full size.
    """
    assert float(run_alone(strobe, MEMORY)) < 64
