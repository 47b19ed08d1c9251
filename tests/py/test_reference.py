"""The oracle itself, against PyTorch's own attention and against the published Philox vectors."""

import numpy as np
import pytest
import torch

import reference
from cases import MASKS, Case, everything, grid, make_inputs, set_keep


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("seqlen_q, seqlen_k", [(33, 33), (20, 45), (45, 20)])
def test_agrees_with_sdpa(mask, seqlen_q, seqlen_k):
    torch.manual_seed(0)
    case = Case((seqlen_q,) * 2, (seqlen_k,) * 2, head_dim=16, head_dim_v=24, heads=4, heads_k=2, **mask)
    inputs = make_inputs(case)
    q, k, v = (x.double() for x in (inputs.q, inputs.k, inputs.v))
    out, _ = reference.attention(inputs.problem, q, k, v)
    dense = reference.mask_of(inputs.problem, 0)
    q, k, v = (x.transpose(1, 2) for x in (q, k.repeat_interleave(2, 2), v.repeat_interleave(2, 2)))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=dense)
    # SDPA's answer for rows that see nothing differs between its kernels; ours is 0.
    expected = expected.where(dense.any(1)[:, None], 0).transpose(1, 2)
    torch.testing.assert_close(out, expected)


def test_mask_examples():
    def rows(mask):
        return ["".join("x" if seen else "." for seen in row) for row in mask.tolist()]

    assert rows(reference.visible(2, 4, causal=True)) == ["xxx.", "xxxx"]
    assert rows(reference.visible(4, 2, causal=True)) == ["..", "..", "x.", "xx"]
    assert rows(reference.visible(5, 5, causal=True, window=(1, 0), keep_first=1)) == [
        "x....",
        "xx...",
        "xxx..",
        "x.xx.",
        "x..xx",
    ]
    assert rows(reference.visible(4, 4, causal=True, window=(0, 0), full_from=2)) == ["x...", ".x..", "xxx.", "xxxx"]
    assert rows(reference.visible(1, 4, window=(1, -1), force_fa_decode=True)) == ["xxxx"]
    assert rows(reference.visible(3, 3, window=(-1, -1), keep_first=2)) == ["xxx"] * 3


def test_philox_known_answers():
    """The vectors that come with the Random123 library."""
    ones = 0xFFFFFFFF
    zero = reference.philox4x32((0, 0, 0, 0), (0, 0))
    full = reference.philox4x32((ones,) * 4, (ones, ones))
    digits = reference.philox4x32((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0))
    for words, expected in (
        (zero, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (full, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (digits, "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ):
        assert " ".join(f"{int(word):08x}" for word in np.ravel(words)) == expected


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_rate_and_independence(p):
    keep = reference.dropout_keep(0x123456789ABCDEF, 3, p, 1, 2, 200, 200).double()
    assert abs(keep.mean().item() - (1 - p)) < 0.01
    centred = keep - keep.mean()
    for other in (centred.flip(0), centred.roll(1, 1), centred.roll(1, 2), centred.roll(16, 2), centred.roll(8, 1)):
        assert abs((centred * other).mean().item()) < 0.006


def test_gradients_by_differences():
    """Autograd through the oracle, sinks, LSE and dropout included, against finite differences."""
    case = Case((5, 3), (4, 6), head_dim=3, head_dim_v=2, heads=2, heads_k=1, heads_v=2, causal=True, window=(2, 0))
    case = Case(**(vars(case) | dict(keep_first=1, sinks=True, dropout=0.3, alibi="h", layout="packed")))
    inputs = make_inputs(case)
    set_keep(inputs, 5, 0)

    def call(q, k, v, sinks):
        out, lse = reference.attention(inputs.problem, q, k, v, sinks)
        return out, lse.where(lse.isfinite(), 0)

    leaves = [t.double().requires_grad_() for t in (inputs.q, inputs.k, inputs.v, inputs.sinks)]
    assert torch.autograd.gradcheck(call, leaves)


def test_unused_memory_is_poisoned_and_unseen():
    for case in (everything(), Case((9, 4), (20, 3), layout="paged", page_size=3, leftpad=True, seqused=True)):
        inputs = make_inputs(case, 1)
        if case.dropout:
            set_keep(inputs, 1, 1)
        assert inputs.k.isnan().any() and inputs.q.isnan().any()
        out, lse = reference.attention(inputs.problem, inputs.q, inputs.k, inputs.v, inputs.sinks)
        assert not out.isnan().any() and not lse.isnan().any()


def test_case_names_are_unique():
    names = [str(case) for case in grid()]
    assert len(set(names)) == len(names)
