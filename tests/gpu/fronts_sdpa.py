"""Strobe behind torch's flash attention: scaled_dot_product_attention and varlen_attn, forward and backward."""

from contextlib import contextmanager

import torch
import torch.nn.functional as F
from fronts import check_gradients, check_results, described, replaced
from scenario import Skip, ints, randn, same_bits, scenario
from torch.nn import attention
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextmanager
def active():
    """Strobe as torch's flash implementation; the calls that it served."""
    if not hasattr(attention, "current_flash_attention_impl"):
        raise Skip(f"torch {torch.__version__} has no registry of flash implementations")
    from strobe import torch_sdpa

    calls = []

    def counted(*arguments, **options):
        calls.append(arguments)
        return inner(*arguments, **options)

    with replaced(torch_sdpa, "_forward", counted) as inner:
        torch_sdpa.activate()
        try:
            yield calls
        finally:
            torch_sdpa.deactivate()


def _inputs(rows, heads=4, device="cuda", dim=64):
    """[batch, heads, rows, dim] for SDPA, as views of what a projection gives."""
    shape = (2, rows, heads, dim)
    return [randn(*shape, device=device).transpose(1, 2).detach().requires_grad_() for _ in range(3)]


def _ours(q, k, v, **options):
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, **options)


@scenario([dict(is_causal=c, compiled=x, dim=d) for c in (False, True) for x in (False, True) for d in (64, 128)])
def sdpa(strobe, is_causal, compiled, dim):
    torch._dynamo.reset()
    q, k, v = inputs = _inputs(130, dim=dim)
    call = described(*(x.detach().transpose(1, 2) for x in (q, k, v)), causal=is_causal, scale=0.2)

    def run(q, k, v):
        return _ours(q, k, v, is_causal=is_causal, scale=0.2)

    with active() as calls:
        out = (torch.compile(run, fullgraph=True) if compiled else run)(*inputs)
        dout = randn(*out.shape)
        gradients = torch.autograd.grad(out, inputs, dout)
    assert len(calls) == 1, f"{len(calls)} calls"
    check_results(call, out.transpose(1, 2).contiguous())
    check_gradients(call, [g.transpose(1, 2) for g in gradients], dout.transpose(1, 2).contiguous())


@scenario()
def torchs_own_comes_back(strobe):
    q, k, v = _inputs(130)
    before = _ours(q, k, v)
    for _ in range(2):
        with active() as calls:
            _ours(q, k, v)
        assert len(calls) == 1
        same_bits(_ours(q, k, v), before)
        assert len(calls) == 1, "Strobe was called after deactivate()"


@scenario()
def dropout(strobe):
    """The backward drops what the forward dropped: out is linear in v, so <dv, v> = <dout, out>."""
    q, k, v = inputs = _inputs(130)
    with active() as calls:
        out, other = (_ours(q, k, v, dropout_p=0.3) for _ in range(2))
        dout = randn(*out.shape)
        dv = torch.autograd.grad(out, inputs, dout)[2]
    assert len(calls) == 2 and not torch.equal(out, other)
    one, other = ((a.double() * b.double()).sum() for a, b in ((dv, v), (dout, out)))
    assert abs((one - other).item()) <= 1e-3 * (dout.double() * out.double()).abs().sum().item(), f"{one} and {other}"


@scenario([dict(window=w) for w in ((-1, -1), (-1, 0), (20, 0))])
def varlen_attn(strobe, window):
    from torch.nn.attention.varlen import varlen_attn as call

    lens = [70, 1, 129]
    q, k, v = inputs = [randn(200, 4, 64).requires_grad_() for _ in range(3)]
    ends = ints(0, 70, 71, 200)
    with active() as calls:
        out = call(q, k, v, ends, ends, 129, 129, window_size=window)
        dout = randn(*out.shape)
        gradients = torch.autograd.grad(out, inputs, dout)
    assert len(calls) == 1, f"{len(calls)} calls"
    expected = described(*(x.detach() for x in inputs), lens, lens, window=window)
    check_results(expected, out)
    check_gradients(expected, gradients, dout)


@scenario()
def in_a_graph(strobe):
    q, k, v = (x.detach() for x in _inputs(130))
    with active():
        _ours(q, k, v, is_causal=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = _ours(q, k, v, is_causal=True)
        for x in (q, k, v):
            x.copy_(torch.randn_like(x))
        graph.replay()
        same_bits(out, _ours(q, k, v, is_causal=True))


@scenario()
def on_the_second_gpu(strobe):
    """The tensors' device counts, not the current one."""
    if torch.cuda.device_count() < 2:
        raise Skip("one GPU")
    first, results = _inputs(130), []
    with active() as calls:
        for device in ("cuda:0", "cuda:1"):
            inputs = [x.detach().to(device).requires_grad_() for x in first]
            out = _ours(*inputs, is_causal=True)
            gradients = torch.autograd.grad(out, inputs, torch.ones_like(out))
            assert all(x.device == torch.device(device) for x in (out, *gradients))
            results.append([out.detach().cpu(), gradients[2].cpu()])
    assert len(calls) == 2 and torch.cuda.current_device() == 0
    same_bits(results[0][:1], results[1][:1])
    torch.testing.assert_close(*(r[1].float() for r in results), atol=2e-2, rtol=2e-2)
