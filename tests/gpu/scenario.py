"""What is no plain call compared with the oracle: registered functions (strobe, **parameters), run by workers."""

import importlib
from dataclasses import dataclass, field

import torch

MODULES = (
    "masks", "hostile", "refusals", "graphs", "concurrency", "routes", "large",
    "fronts_hf", "fronts_sdpa", "fronts_compat", "fronts_fa3", "fronts_vllm",
)  # fmt: skip
ALL = {}


class Skip(Exception):
    """This machine cannot show it; the reason goes into the receipt."""


@dataclass
class Scenario:
    function: object
    guarded: bool  # in a process whose memory comes from the arena
    parameters: list = field(default_factory=lambda: [{}])


@dataclass(frozen=True)
class ScenarioJob:
    name: str
    index: int
    guarded: bool
    kind: str = "scenario"
    backend: str = None

    def __str__(self):
        parameters = ALL[self.name].parameters[self.index]
        return f"{self.name} {parameters}" if parameters else self.name


def scenario(parameters=({},), guarded=False):
    def register(function):
        name = f"{function.__module__}.{function.__name__}"
        ALL[name] = Scenario(function, guarded, list(parameters))
        return function

    return register


def groups():
    for module in MODULES:
        importlib.import_module(module)
    by_module = {}
    for name, entry in ALL.items():
        group = by_module.setdefault((name.split(".")[0], entry.guarded), [])
        group += [ScenarioJob(name, n, entry.guarded) for n in range(len(entry.parameters))]
    return list(by_module.values())


def perform(strobe, job, arena=None):
    entry = ALL[job.name]
    torch.manual_seed(0)
    if arena:
        arena.reset()
    entry.function(strobe, **entry.parameters[job.index])
    if arena:
        arena.check()


def randn(*shape, dtype=torch.bfloat16, device="cuda", **more):
    return torch.randn(shape, device=device, **more).to(dtype)


def qkv(length=200, heads=(4, 2, 4), dims=(64, 64), batch=2, dtype=torch.bfloat16, grad=False, device="cuda"):
    sizes = zip(heads, (dims[0], *dims), strict=True)
    return [randn(batch, length, h, d, dtype=dtype, device=device).requires_grad_(grad) for h, d in sizes]


def ints(*values, device="cuda"):
    return torch.tensor(values, dtype=torch.int32, device=device)


def same_bits(ours, theirs):
    ours, theirs = [[x] if isinstance(x, torch.Tensor) else list(x) for x in (ours, theirs)]
    for n, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert torch.equal(a, b), f"result {n} differs: by {(a.float() - b.float()).abs().max().item():.3g}"


def raises(kinds, text, call):
    """The message of the error that `call` must end with."""
    try:
        call()
    except kinds as error:
        assert text in str(error), f"expected '{text}' in: {error}"
        return str(error)
    raise AssertionError(f"no error with '{text}'")
