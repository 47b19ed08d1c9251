"""Forward: output and LSE of every feature against the oracle; poisoned outputs; strides; bits."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import reference
from cases import Case, grid, make_inputs, run
from checks import check_forward, check_results


@pytest.mark.parametrize("case", grid(), ids=str)
def test_forward(strobe, case):
    check_forward(strobe, make_inputs(case))


def test_returns_only_out_by_default(strobe):
    inputs = make_inputs(Case((9,), head_dim=16))
    out = run(strobe, inputs)
    expected, _, probs = run(strobe, inputs, return_attn_probs=True)
    assert torch.equal(out, expected)
    assert probs.numel() == 0


@pytest.mark.parametrize("strided", ["transposed", "sliced"])
def test_out_may_be_strided(strobe, strided):
    inputs = make_inputs(Case((21, 21), heads=3, head_dim=16))
    expected = run(strobe, inputs)
    shape = (2, 24, 6, 19)
    whole = torch.full((2, 6, 24, 19) if strided == "transposed" else shape, 7.0)
    out = (whole.transpose(1, 2) if strided == "transposed" else whole)[:, 2:23, 1:6:2, 1:17]
    result = run(strobe, inputs, out=out)
    assert result.data_ptr() == out.data_ptr()
    assert torch.equal(out, expected)
    out.fill_(7.0)
    assert (whole == 7.0).all(), "written outside of out"


def test_expanded_inputs(strobe):
    q, k = torch.randn(1, 30, 1, 32), torch.randn(1, 30, 1, 32)
    q, k, v = q.expand(2, 30, 4, 32), k.expand(2, 30, 4, 32), k.expand(2, 30, 4, 32)
    expected = strobe.flash_attn_func(q.contiguous(), k.contiguous(), v.contiguous(), causal=True)
    assert torch.equal(strobe.flash_attn_func(q, k, v, causal=True), expected)


def test_last_dimension_may_be_strided(strobe):
    q, k, v = (torch.randn(2, 32, 4, 30).transpose(1, 3) for _ in range(3))
    expected = strobe.flash_attn_func(*(x.contiguous() for x in (q, k, v)))
    assert torch.equal(strobe.flash_attn_func(q, k, v), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_scores_do_not_overflow(strobe, dtype):
    """Scores of +-1e4: one key takes everything; and sinks far above or below every score."""
    q = torch.full((1, 3, 2, 16), 100.0, dtype=dtype)
    k = torch.full((1, 5, 2, 16), -25.0, dtype=dtype)
    k[:, 2] = 25.0
    v = torch.randn(1, 5, 2, 16).to(dtype)
    out, lse, _ = strobe.flash_attn_func(q, k, v, return_attn_probs=True)
    assert torch.equal(out, v[:, 2:3].expand_as(out))
    torch.testing.assert_close(lse, torch.full_like(lse, 1e4))
    sinks = torch.tensor([3e38, -3e38])
    out, lse, _ = strobe.flash_attn_func(q, k, v, return_attn_probs=True, s_aux=sinks)
    assert (out[:, :, 0] == 0).all() and torch.equal(out[:, :, 1], v[:, 2:3, 1].expand(1, 3, 16))
    torch.testing.assert_close(lse[0, :, 0], torch.tensor([3e38, 1e4]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_sinks_in_any_dtype(strobe, dtype):
    inputs = make_inputs(Case((20,), heads=4, head_dim=16, sinks=True))
    inputs.sinks = inputs.sinks.to(dtype)
    out, lse, _ = run(strobe, inputs, return_attn_probs=True)
    inputs.sinks = inputs.sinks.float()
    check_results(inputs, out, lse)


def test_nan_stays_in_its_rows(strobe):
    """A NaN in one query row, one batch entry or one head reaches no other."""
    q, k, v = torch.randn(2, 40, 4, 32), torch.randn(2, 40, 2, 32), torch.randn(2, 40, 2, 32)
    clean = strobe.flash_attn_func(q, k, v, causal=True)
    q[0, 3, 1] = float("nan")
    v[1, 0, 1] = float("nan")
    out = strobe.flash_attn_func(q, k, v, causal=True)
    touched = torch.zeros(2, 40, 4, dtype=torch.bool)
    touched[0, 3, 1] = touched[1, :, 2:] = True
    assert torch.equal(out.isnan().any(-1), touched)
    assert torch.equal(out[~touched], clean[~touched])


@pytest.mark.parametrize("shape", [((70, 70), (45, 45)), ((1, 1), (130, 130)), ((33, 33), (33, 33))])
def test_attention_probabilities(strobe, shape):
    """S_dmask: normalised probabilities, negative where dropped, 0 outside the mask, in rounded-up shape."""
    case = Case(*shape, dropout=0.3, heads=3, head_dim=16, causal=True)
    inputs = make_inputs(case)
    _, _, probs = check_forward(strobe, inputs)
    sq, sk = case.seqlens_q[0], case.seqlens_k[0]
    assert probs.shape == (2, 3, -(-sq // 128) * 128, -(-sk // 128) * 128) and probs.dtype == inputs.q.dtype
    for b in range(2):
        flat = [x.double().flatten(0, 1) for x in (inputs.q, inputs.k, inputs.v)]
        truth = reference.attend_sequence(inputs.problem, b, *flat, None).probs
        torch.testing.assert_close(probs[b, :, :sq, :sk].abs().double(), truth, rtol=1e-4, atol=1e-6)


def test_dropout_draws_anew_and_obeys_manual_seed(strobe):
    inputs = make_inputs(Case((64,), dropout=0.5, head_dim=16))
    torch.manual_seed(11)
    first, second = run(strobe, inputs), run(strobe, inputs)
    torch.manual_seed(11)
    assert torch.equal(run(strobe, inputs), first)
    assert not torch.equal(first, second)


def test_dropout_bits_depend_on_position_only(strobe):
    """One seed keeps the same (batch, head, i, j) in every layout, dtype, mask and length."""
    base = Case((70, 70), (45, 45), dropout=0.25, heads=3, head_dim=16)
    keeps = []
    for change in ({}, dict(layout="packed"), dict(dtype="bf16"), dict(seqlens_k=(90, 90)), dict(head_dim=40)):
        inputs = make_inputs(replace(base, **change))
        torch.manual_seed(3)
        _, _, probs = run(strobe, inputs, return_attn_probs=True)
        keeps.append(torch.signbit(probs[:, :, :70, :45]))
    assert all(torch.equal(keep, keeps[0]) for keep in keeps)
    assert abs(keeps[0].double().mean().item() - 0.25) < 0.02


THREADS = """
import sys, torch
sys.path.insert(0, "tests/py")
torch.set_num_threads(int(sys.argv[1]))
import strobe, hashlib
from cases import Case, everything, make_inputs, run
digest = hashlib.sha256()
cases = [everything(), Case((130,), (259,), "bf16", causal=True, heads=6, heads_k=2, heads_v=1), Case((1,), (900,))]
for case in cases:
    inputs = make_inputs(case)
    leaves = [t.detach().requires_grad_() for t in (inputs.q, inputs.k, inputs.v)]
    torch.manual_seed(0)
    out = run(strobe, inputs, *leaves)
    for t in (out, *torch.autograd.grad(out, leaves, inputs.dout)):
        digest.update(t.detach().contiguous().view(torch.uint8).numpy().tobytes())
print(digest.hexdigest())
"""


def test_same_bits_with_any_number_of_threads(strobe):
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    digests = set()
    for threads in ("1", "2", "3"):
        path = os.pathsep.join([os.path.dirname(os.path.dirname(strobe.__file__)), os.environ.get("PYTHONPATH", "")])
        env = os.environ | dict(STROBE_NUM_THREADS=threads, OMP_NUM_THREADS=threads, PYTHONPATH=path)
        command = [sys.executable, "-c", THREADS, threads]
        digests.add(subprocess.run(command, env=env, cwd=root, check=True, capture_output=True, text=True).stdout)
    assert len(digests) == 1
