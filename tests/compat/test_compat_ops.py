"""The semi-private custom ops and flash_attn_2_cuda: forward and backward apart give what autograd gives."""

import inspect

import flash_attn
import flash_attn_2_cuda
import flash_attn_2_cuda_vllm
import pytest
import torch
from flash_attn import flash_attn_interface as interface
from oracle import check_both, check_gradients, dense, lengths, offsets, packed, tensors

from strobe.compat.arguments import lse_of_fa2, lse_of_fa3

INF = float("inf")
MASK = dict(causal=True, window=(4, 0), keep_first=2)
KEPT = dict(keep_first=2, force_fa_decode=False)


def test_ops_are_custom_ops_with_an_init_function():
    """ring-flash-attention reads the defaults of `_init_fn`."""
    for name in ("_flash_attn_forward", "_flash_attn_varlen_forward", "_flash_attn_backward"):
        op = getattr(interface, name)
        assert isinstance(op, torch._library.custom_ops.CustomOpDef)
        assert "softcap" in inspect.getfullargspec(op._init_fn).args
        assert getattr(interface, f"_wrapped{name}") is getattr(torch.ops.flash_attn, name)


def test_dense_forward_and_backward():
    q, k, v = tensors(2, 17, 21, 4, 2, 16, 24)
    out, lse, probs, rng_state = interface._flash_attn_forward(
        q, k, v, 0.0, 0.25, True, 4, 0, 0.0, None, False, keep_first=2
    )
    assert probs.numel() == 0 and rng_state.dtype == torch.int64 and rng_state.shape == (2,)
    compute = lambda *x: dense(*x, scale=0.25, **MASK)  # noqa: E731
    check_both((out, lse), compute, q, k, v)
    dout = torch.randn_like(out)
    gradients = [torch.full_like(x, float("nan")) for x in (q, k, v)]
    softmax_d = torch.ops.flash_attn._flash_attn_backward(
        dout, q, k, v, out, lse, *gradients, 0.0, 0.25, True, 4, 0, 0.0, None, True, None, keep_first=2
    )
    check_gradients(gradients, compute, q, k, v, dout)
    assert softmax_d.shape == (2, 4, 128)
    torch.testing.assert_close(softmax_d[..., :17], (dout * out).sum(-1).transpose(1, 2))
    assert softmax_d[..., 17:].abs().max() == 0


def test_varlen_forward_and_backward():
    lens_q, lens_k = [5, 1, 9], [8, 6, 4]
    q, k, v = tensors(None, 15, 18)
    cu_q, cu_k = offsets(lens_q), offsets(lens_k)
    head = (cu_q, cu_k, 9, 8, 0.0, 0.25, True)
    out, lse, _, _ = interface._flash_attn_varlen_forward(q, k, v, *head, 4, 0, keep_first=2, force_fa_decode=True)

    def compute(*x):
        return packed(*x, lens_q, lens_k, scale=0.25, force_fa_decode=True, **MASK)

    check_both((out, lse), compute, q, k, v)
    dout = torch.randn_like(out)
    gradients = [torch.empty_like(x) for x in (q, k, v)]
    softmax_d = interface._flash_attn_varlen_backward(
        dout, q, k, v, out, lse, *gradients, *head, 4, 0, 0.0, None, False, keep_first=2, force_fa_decode=True
    )
    check_gradients(gradients, compute, q, k, v, dout)
    assert softmax_d.shape == (4, 15 + 3 * 128)
    delta = (dout * out).sum(-1).T
    for b in range(3):
        rows = slice(cu_q[b], cu_q[b + 1])
        torch.testing.assert_close(softmax_d[:, cu_q[b] + 128 * b : cu_q[b + 1] + 128 * b], delta[:, rows])


def test_dropout_of_the_backward_is_that_of_the_forward():
    q, k, v = tensors(2, 30, 30, grad=True)
    torch.manual_seed(5)
    out = flash_attn.flash_attn_func(q, k, v, 0.3, causal=True)
    dout = torch.randn_like(out)
    expected = torch.autograd.grad(out, (q, k, v), dout)
    torch.manual_seed(5)
    result, lse, probs, rng_state = interface._flash_attn_forward(q, k, v, 0.3, 0.25, True, -1, -1, 0.0, None, True)
    assert torch.equal(out, result) and probs.shape == (2, 4, 128, 128) and (probs < 0).any()
    gradients = [torch.empty_like(x) for x in (q, k, v)]
    head = (dout, q, k, v, result, lse, *gradients, 0.3, 0.25, True, -1, -1, 0.0, None, False)
    with torch.no_grad():
        interface._flash_attn_backward(*head, rng_state)
    for a, b in zip(gradients, expected, strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(ValueError, match="rng_state is None"):
        interface._flash_attn_backward(*head)
    with pytest.raises(ValueError, match="return_softmax is True"):
        interface._flash_attn_forward(q, k, v, 0.0, 0.25, True, -1, -1, 0.0, None, True)


def test_opcheck():
    q, k, v = tensors(2, 9, 9)
    cu = offsets([4, 5])
    scalars = (0.0, 0.25, True, 4, 0, 0.0, None)
    out, lse, _, _ = interface._flash_attn_forward(q, k, v, *scalars, False)
    gradients = [torch.empty_like(x) for x in (q, k, v)]
    checks = ("test_schema", "test_faketensor")
    ops = torch.ops.flash_attn
    torch.library.opcheck(ops._flash_attn_forward, (q, k, v, *scalars, False), test_utils=checks)
    torch.library.opcheck(ops._flash_attn_backward, (out, q, k, v, out, lse, *gradients, *scalars, False),
                          test_utils=checks)  # fmt: skip
    packed_q, packed_k, packed_v = q[0], k[0], v[0]
    head = (cu, cu, 5, 5, *scalars)
    torch.library.opcheck(ops._flash_attn_varlen_forward, (packed_q, packed_k, packed_v, *head), test_utils=checks)
    lse = lse[0].contiguous()
    args = (out[0], packed_q, packed_k, packed_v, out[0], lse, *(g[0] for g in gradients), *head, False)
    torch.library.opcheck(ops._flash_attn_varlen_backward, args, test_utils=checks)


def test_compiled_without_graph_break():
    q, k, v = tensors(2, 9, 9)

    def program(q, k, v):
        out = interface._flash_attn_forward(q, k, v, 0.0, 0.25, True, 4, 0, 0.0, None, False, keep_first=2)[0]
        return out + flash_attn.flash_attn_func(q, k, v, 0.0, 0.25, True, (4, 0), 0.0, 2, False)

    compiled = torch.compile(program, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), program(q, k, v))
    cu = offsets([4, 5])

    def packed_program(q, k, v):
        return flash_attn.flash_attn_varlen_func(q, k, v, cu, cu, 5, 5, causal=True, window_size=(4, 0), keep_first=2)

    compiled = torch.compile(packed_program, fullgraph=True, backend="aot_eager")
    rows = [x[0] for x in (q, k, v)]
    torch.testing.assert_close(compiled(*rows), packed_program(*rows))


@pytest.mark.parametrize("module", [flash_attn_2_cuda, flash_attn_2_cuda_vllm], ids=lambda m: m.__name__)
@pytest.mark.parametrize("kept", [(), (2, True)], ids=["FlashAttention", "SWAA"])
def test_extension_by_its_number_of_arguments(module, kept):
    q, k, v = tensors(2, 9, 9)
    keep = 2 if kept else 0
    slopes = torch.rand(4)

    def compute(*x):
        return dense(*x, scale=0.3, slopes=slopes, causal=True, window=(3, 0), keep_first=keep)

    buffer = torch.full_like(q, float("nan"))
    window = (True, 3, 0, 0.0, *kept)
    out, lse, probs, rng_state = module.fwd(q, k, v, buffer, slopes, 0.0, 0.3, *window, False, None)
    assert out.data_ptr() == buffer.data_ptr() and probs.numel() == 0
    check_both((out, lse), compute, q, k, v)
    dout = torch.randn_like(out)
    dq, dk, dv, softmax_d = module.bwd(
        dout, q, k, v, out, lse, None, None, None, slopes, 0.0, 0.3, *window, False, None, rng_state
    )
    check_gradients((dq, dk, dv), compute, q, k, v, dout)

    cu = offsets([9, 9])
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    varlen = (9, 9, 0.0, 0.3, False, *window)
    for more in ((), (0,)) if not kept else ((),):
        results = module.varlen_fwd(*flat, None, cu, cu, None, None, None, slopes, *varlen, False, None, *more)
        assert torch.equal(results[0], out.flatten(0, 1))
    assert torch.equal(results[1], lse.transpose(0, 1).flatten(1))
    gradients = module.varlen_bwd(
        dout.flatten(0, 1), *flat, *results[:2], None, None, None, cu, cu, slopes, *varlen, True, None, rng_state
    )
    for a, b in zip(gradients[:3], (dq, dk, dv), strict=True):
        assert torch.equal(a, b.flatten(0, 1))

    cached = module.fwd_kvcache(
        q, k, v, None, None, lengths(9, 9), None, None, None, None, None, slopes, None, 0.3, *window, True, 0
    )
    torch.testing.assert_close(cached[0], out)


def test_extension_refuses_other_numbers_of_arguments_and_a_generator():
    q, k, v = tensors(1, 4, 4)
    with pytest.raises(TypeError, match=r"fwd: 4 arguments are given, it takes 13 \(FlashAttention\), 15 \(SWAA\)"):
        flash_attn_2_cuda.fwd(q, k, v, None)
    with pytest.raises(NotImplementedError, match="`generator` argument is no longer supported and must be None"):
        flash_attn_2_cuda.fwd(q, k, v, None, None, 0.0, 0.3, True, -1, -1, 0.0, False, torch.Generator())


def test_zero_tensors_marks_the_lse_of_rows_in_no_sequence():
    q, k, v = tensors(None, 9, 6)
    cu = offsets([2, 4])
    args = (q, k, v, cu, cu, 4, 4, 0.0, 0.25, False)
    out, lse, _, _ = interface._flash_attn_varlen_forward(*args, zero_tensors=True)
    assert torch.equal(lse[:, 6:], torch.full((4, 3), -INF)) and lse[:, :6].isfinite().all()
    assert out[6:].abs().max() == 0
    gradients = [torch.full_like(x, float("nan")) for x in (q, k, v)]
    interface._flash_attn_varlen_backward(
        torch.ones_like(out), q, k, v, out, lse, *gradients, *args[3:], -1, -1, 0.0, None, False, zero_tensors=True
    )
    assert all(g.isfinite().all() for g in gradients) and gradients[0][6:].abs().max() == 0


def test_an_empty_row_of_flash_attention_3_is_one_of_flash_attention_2():
    """The engines know an empty row by LSE +inf."""
    lse = torch.tensor([-INF, 1.0, INF])
    assert torch.equal(lse_of_fa2(lse), torch.tensor([INF, 1.0, INF]))
    assert torch.equal(lse_of_fa3(lse), torch.tensor([-INF, 1.0, -INF]))
