"""Strobe behind torch's flash operators. Torch routes CUDA tensors there; here the kernels themselves take CPU tensors,
and a CPU-only torch shows which operators have a CUDA kernel."""

import inspect
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.nn import attention

from strobe import torch_sdpa


def overridden():
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return [name for name in torch_sdpa.KERNELS if has(f"aten::{name}", "CUDA")]


def test_activate_and_deactivate():
    before = overridden()
    assert not torch_sdpa.active()
    torch_sdpa.deactivate()  # nothing to do
    for _ in range(2):
        torch_sdpa.activate()
        assert torch_sdpa.active() and attention.current_flash_attention_impl() == "Strobe"
        assert set(overridden()) == {name for name in torch_sdpa.KERNELS if hasattr(torch.ops.aten, name)}
        torch_sdpa.deactivate()
        assert not torch_sdpa.active() and attention.current_flash_attention_impl() is None
        assert overridden() == before


def test_another_implementation_takes_over():
    class Handle:
        def remove(self):
            pass

    attention.register_flash_attention_impl("other", register_fn=Handle)
    before = overridden()
    torch_sdpa.activate()
    attention.activate_flash_attention_impl("other")
    assert overridden() == before
    torch_sdpa.deactivate()
    assert attention.current_flash_attention_impl() == "other"
    attention.restore_flash_attention_impl()


def test_nothing_is_active_after_import():
    script = "import strobe.torch_sdpa; print(strobe.torch_sdpa.active())"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "False\n"


def test_a_torch_without_the_registry_says_so(monkeypatch):
    monkeypatch.delattr(attention, "current_flash_attention_impl")
    with pytest.raises(RuntimeError, match="has no registry of flash implementations"):
        torch_sdpa.activate()


@pytest.mark.parametrize("name", torch_sdpa.KERNELS)
def test_the_kernels_take_what_the_schema_has(name):
    if name == "_flash_attention_forward_no_dropout_inplace":
        kernel, arguments = torch_sdpa.forward, getattr(torch.ops.aten, name).default._schema.arguments[1:]
    else:
        kernel, arguments = torch_sdpa.KERNELS[name], getattr(torch.ops.aten, name).default._schema.arguments
    parameters = list(inspect.signature(kernel).parameters.values())
    for argument, parameter in zip(arguments, parameters, strict=False):
        assert argument.name == parameter.name
        assert argument.kwarg_only == (parameter.kind is inspect.Parameter.KEYWORD_ONLY)
    assert {p.name for p in parameters[len(arguments) :]} <= {"out"}
    assert len(parameters) >= len(arguments)


def inputs(*shape, heads_k=None):
    q = torch.randn(shape, requires_grad=True)
    shape = list(shape)
    shape[1] = heads_k or shape[1]
    return q, *(torch.randn(shape, requires_grad=True) for _ in range(2))


@pytest.mark.parametrize("layout", ["heads first", "rows first"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_sdpa(is_causal, layout):
    if layout == "heads first":
        q, k, v = inputs(2, 3, 19, 16)
    else:
        q, k, v = (x.detach().transpose(1, 2).requires_grad_() for x in inputs(2, 19, 3, 16))
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=0.3)
    dout = torch.randn_like(expected)
    with torch.no_grad():
        result = torch_sdpa.sdpa_forward(q, k, v, 0.0, is_causal, scale=0.3)
        out, lse, cu_q, cu_k, max_q, max_k, seed, offset, debug = result
        gradients = torch_sdpa.sdpa_backward(
            dout, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, 0.0, is_causal, seed, offset, scale=0.3
        )
    torch.testing.assert_close(out, expected)
    assert out.stride() == q.stride() and lse.shape == (2, 3, 19) and (max_q, max_k) == (19, 19)
    scores = (q @ k.mT * 0.3).masked_fill(~torch.ones(19, 19).tril().bool() & is_causal, -torch.inf)
    torch.testing.assert_close(lse, scores.logsumexp(-1).float())
    for ours, theirs in zip(gradients, torch.autograd.grad(expected, (q, k, v), dout), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


def test_causal_with_other_lengths_is_refused():
    q, k, _ = inputs(1, 2, 5, 8)
    with pytest.raises(ValueError, match="is_causal with 3 queries and 5 keys"):
        torch_sdpa.sdpa_forward(q[:, :, :3], k, k, is_causal=True)


def test_dropout_is_the_same_in_the_backward():
    q, k, v = inputs(1, 2, 33, 8)
    out, lse, *_, max_q, max_k, seed, offset, debug = torch_sdpa.sdpa_forward(q, k, v, 0.4)
    assert seed.dtype == torch.uint64 and seed.any()
    # out is linear in v, so <dv, v> = <dout, out> exactly where both drop the same scores.
    dout = torch.randn_like(out)
    dv = torch_sdpa.sdpa_backward(dout, q, k, v, out, lse, None, None, 33, 33, 0.4, False, seed, offset)[2]
    torch.testing.assert_close((dv * v).sum(), (dout * out).sum(), atol=1e-4, rtol=1e-5)
    other = torch_sdpa.sdpa_backward(
        dout, q, k, v, out, lse, None, None, 33, 33, 0.4, False, torch.tensor([1, 2], dtype=torch.uint64), offset
    )[2]
    assert (other - dv).abs().max() > 1e-3


def test_the_debug_mask_with_dropout_is_refused():
    q, k, v = inputs(1, 2, 5, 8)
    with pytest.raises(NotImplementedError, match="return_debug_mask"):
        torch_sdpa.sdpa_forward(q, k, v, 0.5, False, True)


@pytest.fixture
def on_the_cpu():
    """torch's varlen_attn on CPU tensors: Strobe's kernels of its operators under the CPU key, where torch has none."""
    library = torch.library.Library("aten", "IMPL", "CPU")
    for name in (
        "_flash_attention_forward",
        "_flash_attention_forward_no_dropout_inplace",
        "_flash_attention_backward",
    ):
        library.impl(name, torch_sdpa.KERNELS[name], "CPU")
    yield
    library._destroy()


@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (5, 0), (4, 3)])
def test_varlen_attn(on_the_cpu, window):
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    lengths = torch.tensor([7, 1, 12])
    ends = F.pad(lengths.cumsum(0), (1, 0)).int()
    q, k, v = (torch.randn(20, 4, 16, requires_grad=True) for _ in range(3))
    out, lse = varlen_attn(q, k, v, ends, ends, 12, 12, window_size=window, return_aux=AuxRequest(lse=True))
    assert lse.shape == (4, 20)
    dout, parts = torch.randn_like(out), []
    for a, b in zip(ends[:-1], ends[1:], strict=True):
        i, j = torch.arange(b - a)[:, None], torch.arange(b - a)[None]
        left, right = (bound if bound >= 0 else 99 for bound in window)
        mask = (j >= i - left) & (j <= i + right)
        one = (x[a:b].transpose(0, 1) for x in (q, k, v))
        parts.append(F.scaled_dot_product_attention(*one, mask).transpose(0, 1))
    expected = torch.cat(parts)
    torch.testing.assert_close(out, expected)
    gradients = (torch.autograd.grad(o, (q, k, v), dout) for o in (out, expected))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


def test_varlen_attn_over_pages_and_in_place(on_the_cpu):
    from torch.nn.attention import varlen

    lengths, size = torch.tensor([7, 3], dtype=torch.int32), 4
    k, v = (torch.randn(8, size, 2, 16) for _ in range(2))
    table = torch.tensor([[3, 5], [6, 0]], dtype=torch.int32)
    q, ends = torch.randn(2, 4, 16), torch.tensor([0, 1, 2], dtype=torch.int32)
    out = torch.empty_like(q)
    call = dict(enable_gqa=True, seqused_k=lengths, block_table=table, window_size=(-1, 0))
    varlen.varlen_attn_out(out, q, k, v, ends, None, 1, 8, **call)
    for b, n in enumerate(lengths.tolist()):
        own = (x[table[b].long()].flatten(0, 1)[:n].transpose(0, 1).repeat_interleave(2, 0) for x in (k, v))
        expected = F.scaled_dot_product_attention(q[b, :, None], *own)
        torch.testing.assert_close(out[b], expected[:, 0])
