"""One job in a worker: the call under guards, compared with the oracle."""

import functools
import types

import oracle
import torch

import cache_cases
import checks
from cases import run

REPEATS = 6


class Refused(Exception):
    """The engine that was asked for does not serve the call, and said so."""


def attention(strobe, job, device):
    inputs = oracle.attention_inputs(job.case, job.seed, device)
    before = [s.clone() for s in oracle.storages(inputs)]
    torch.manual_seed(job.seed)
    if job.kind == "forward":
        checks.check_forward(strobe, inputs, backend=job.backend)
    else:
        deterministic = job.kind == "deterministic"
        checks.check_gradients(strobe, inputs, job.seed % 2 == 0, backend=job.backend, deterministic=deterministic)
    for old, new in zip(before, oracle.storages(inputs), strict=True):
        assert torch.equal(old, new), "an input was written"


def cache(strobe, job, device):
    inputs = oracle.cache_inputs(job.case, job.seed, device)
    call = functools.partial(strobe.flash_attn_with_kvcache, backend=job.backend)
    cache_cases.check(types.SimpleNamespace(flash_attn_with_kvcache=call), inputs)


def repeat(strobe, job, device):
    """The same bits again and again, while other work comes and goes between the calls."""
    inputs = oracle.attention_inputs(job.case, job.seed, device)
    first = None
    for n in range(REPEATS):
        torch.manual_seed(job.seed)
        leaves = [t.detach().requires_grad_() for t in (inputs.q, inputs.k, inputs.v, inputs.sinks)]
        out = run(strobe, inputs, *leaves, backend=job.backend, deterministic=True)
        results = [out, *torch.autograd.grad(out, leaves, inputs.dout)]
        torch.randn(1 << (8 + 2 * n), device=device).sort()
        if first is None:
            first = [t.detach().clone() for t in results]
            continue
        for name, one, other in zip(("out", "dq", "dk", "dv", "dsinks"), first, results, strict=True):
            assert cache_cases.same_bits(one, other.detach()), f"{name}: other bits in run {n}"


KINDS = dict(forward=attention, backward=attention, deterministic=attention, cache=cache, repeat=repeat)


def perform(strobe, job, device, arena=None):
    if arena:
        arena.reset()
    with torch.device(device):
        try:
            KINDS[job.kind](strobe, job, device)
        except (NotImplementedError, ValueError) as error:
            if job.backend and job.backend != "sm80" and job.backend in str(error):
                raise Refused(str(error)) from error
            raise
        if arena:
            arena.check()
