"""Which keys a row sees, read off the engine exactly: with v a one-hot of the key, out is the row of probabilities."""

import itertools

import pytest
import torch

import reference
from cases import MASKS

LENGTHS = [(0, 5), (1, 1), (1, 70), (70, 1), (17, 40), (40, 17), (64, 64), (65, 130), (130, 65)]


def seen_by(strobe, seqlen_q, seqlen_k, batch=1, **mask):
    """Probabilities over equal scores: 1 / (visible keys) where visible, 0 elsewhere."""
    q, k = torch.zeros(batch, seqlen_q, 1, 8), torch.zeros(batch, seqlen_k, 1, 8)
    v = torch.eye(seqlen_k).view(1, seqlen_k, 1, seqlen_k).expand(batch, -1, -1, -1)
    out, lse, _ = strobe.flash_attn_func(q, k, v, return_attn_probs=True, **mask)
    return out[:, :, 0], lse[:, 0]


def compare(strobe, seqlen_q, seqlen_k, **mask):
    probs, lse = seen_by(strobe, seqlen_q, seqlen_k, **renamed(mask))
    dense = reference.visible(seqlen_q, seqlen_k, **mask)
    assert torch.equal(probs[0] != 0, dense), mask
    counts = dense.sum(1)
    expected = torch.where(counts > 0, counts.double().log(), reference.INF).float()
    torch.testing.assert_close(lse[0], expected, rtol=1e-5, atol=1e-5)


def renamed(mask):
    return {("window_size" if name == "window" else name): value for name, value in mask.items()}


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_visible_keys(strobe, lengths, mask):
    compare(strobe, *lengths, **mask)


@pytest.mark.parametrize("full_from", [None, 0, 5, 33])
@pytest.mark.parametrize("keep_first", [0, 1, 16, 65, 1000])
def test_windows_by_full_from_and_keep_first(strobe, full_from, keep_first):
    for left, right in itertools.product((-1, 0, 15, 64), (-1, 0, 17)):
        for lengths in ((40, 90), (90, 40)):
            compare(strobe, *lengths, window=(left, right), keep_first=keep_first, full_from=full_from)


def test_huge_windows_are_unbounded(strobe):
    for huge in (10**6, 2**31 - 1, 2**40):
        probs, _ = seen_by(strobe, 20, 30, window_size=(huge, huge))
        assert (probs != 0).all()


def test_force_fa_decode_is_per_sequence(strobe):
    probs, _ = seen_by(strobe, 1, 50, window_size=(3, 0), force_fa_decode=True)
    assert (probs != 0).all()
    probs, _ = seen_by(strobe, 2, 50, window_size=(3, 0), force_fa_decode=True)
    assert torch.equal(probs[0] != 0, reference.visible(2, 50, window=(3, 0)))


def test_full_from_per_sequence(strobe):
    limits = torch.tensor([0, 7, 20], dtype=torch.int32)
    probs, _ = seen_by(strobe, 20, 20, batch=3, window_size=(2, 0), full_from=limits)
    for b, limit in enumerate(limits.tolist()):
        assert torch.equal(probs[b] != 0, reference.visible(20, 20, window=(2, 0), full_from=limit))


def test_window_size_forms(strobe):
    expected, _ = seen_by(strobe, 20, 30, window_size=(4, 2))
    for form in ([4, 2], (torch.tensor(4), torch.tensor(2))):
        assert torch.equal(seen_by(strobe, 20, 30, window_size=form)[0], expected)
    assert torch.equal(seen_by(strobe, 20, 30, window_size=None)[0], seen_by(strobe, 20, 30)[0])


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_hidden_keys_get_no_gradient(strobe, mask):
    """Keys that no row sees: exactly 0, even where NaN lies in k and v there is none in seen rows' gradients."""
    q, k, v = torch.randn(1, 12, 2, 16), torch.randn(1, 60, 2, 16), torch.randn(1, 60, 2, 16)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    strobe.flash_attn_func(*leaves, **renamed(mask)).square().sum().backward()
    seen = reference.visible(12, 60, **mask).any(0)
    assert (k.grad[:, ~seen] == 0).all() and (v.grad[:, ~seen] == 0).all()
    assert (v.grad[:, seen] != 0).any(-1).all()
