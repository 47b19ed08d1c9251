"""The oracle's own mask, and what the CPU engine and the GPU agree on bit by bit."""

import itertools

import oracle
import torch
from scenario import ints, qkv, scenario


def _loops(*arguments):
    """reference.visible() as it is written; oracle.py replaces only what calls it."""
    import reference

    return reference.visible(*arguments)


@scenario()
def oracle_mask_is_the_definition(strobe):
    windows = [(-1, -1), (3, 0), (0, 0), (5, 2), (-1, 4), (2, -1)]
    lengths = [(0, 3), (3, 0), (1, 9), (7, 7), (5, 12), (12, 5)]
    options = itertools.product(lengths, (False, True), windows, (0, 2, 20), (False, True), (None, 0, 4))
    for (sq, sk), *rest in options:
        assert torch.equal(oracle.visible(sq, sk, *rest), _loops(sq, sk, *rest)), f"{sq} {sk} {rest}"


@scenario([dict(dtype=d, packed=p) for d in (torch.bfloat16, torch.float16) for p in (False, True)])
def dropout_keeps_what_the_cpu_engine_keeps(strobe, dtype, packed):
    """With one-hot values, the output is the kept probabilities themselves."""
    length, heads = 128, 3
    q, k, _ = qkv(length, (heads, heads, heads), (64, 128), 1, dtype)
    v = torch.eye(length, dtype=dtype, device="cuda")[None, :, None].expand(1, length, heads, length).contiguous()
    cu = ints(0, length)
    results = []
    for device in ("cuda", "cpu"):
        torch.manual_seed(3)
        tensors = [x.to(device) for x in (q, k, v)]
        if packed:
            tensors = [x[0] for x in tensors] + [cu.to(device)] * 2 + [length, length]
        call = strobe.flash_attn_varlen_func if packed else strobe.flash_attn_func
        results.append(call(*tensors, dropout_p=0.3).reshape(length, heads, length).cpu())
    assert torch.equal(results[0] == 0, results[1] == 0)
    assert abs((results[0] == 0).double().mean().item() - 0.3) < 0.02
    torch.testing.assert_close(results[0].float(), results[1].float(), rtol=2e-2, atol=2e-4)


@scenario([dict(dtype=d) for d in (torch.bfloat16, torch.float16)])
def a_window_without_keys_and_kept_tokens_alone(strobe, dtype):
    """Rows whose window is empty see the kept tokens only, or nothing: out 0, LSE +inf."""
    q, k, v = qkv(40, dims=(32, 48), dtype=dtype)
    k, v = k[:, :10].contiguous(), v[:, :10].contiguous()
    out, lse, _ = strobe.flash_attn_func(q, k, v, causal=True, window_size=(3, 0), return_attn_probs=True)
    assert (out[:, :30] == 0).all() and (lse[..., :30] == float("inf")).all()
    assert lse[..., 30:].isfinite().all()
    sinks = torch.randn(4, device="cuda")
    out, lse, _ = strobe.flash_attn_func(q, k, v, causal=True, s_aux=sinks, return_attn_probs=True)
    assert (out[:, :30] == 0).all() and torch.equal(lse[..., :30], sinks[None, :, None].expand(2, 4, 30))
