"""What the scenarios of the fronts share: the drop-ins as if installed, missing packages, and the oracle."""

import importlib.util
import re
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import oracle  # noqa: F401  (gives `reference` masks without loops)
import torch
from scenario import Skip

import checks
import reference
from cases import offsets, rows_of

ROOT = Path(__file__).resolve().parents[2]


def install_drop_ins(folder):
    """The four distributions of compat/ with what importlib.metadata knows of installed ones: Transformers asks it."""
    for source in sorted((ROOT / "compat").glob("*/pyproject.toml")):
        name, version = (re.search(rf'^{key} = "(.*)"', source.read_text(), re.M)[1] for key in ("name", "version"))
        modules = [path for path in sorted(source.parent.iterdir()) if path.is_dir() and path.name != "__pycache__"]
        info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (info / "top_level.txt").write_text("".join(f"{path.name}\n" for path in modules))
        for path in modules:
            (folder / path.name).symlink_to(path)
    return str(folder)


def needs(name):
    if importlib.util.find_spec(name) is None:
        raise Skip(f"{name} is not installed")


@contextmanager
def replaced(holder, name, value):
    before = getattr(holder, name)
    setattr(holder, name, value)
    try:
        yield before
    finally:
        setattr(holder, name, before)


def described(q, k, v, lens_q=None, lens_k=None, scale=None, sinks=None, slopes=None, masks=None, **mask):
    """A call in the oracle's terms: dense, or packed with lengths. masks, one a sequence, are in place of the rule."""
    with torch.device(q.device):
        if lens_q is None:
            lens_q, lens_k = [q.shape[1]] * q.shape[0], [k.shape[1]] * k.shape[0]
        rows = [rows_of(offsets(lens).tolist()[:-1], lens) for lens in (lens_q, lens_k)]
    problem = reference.Problem(*rows, q.shape[-1] ** -0.5 if scale is None else scale, slopes=slopes, **mask)
    if masks is not None:
        problem.masks = dict(enumerate(masks))
    return SimpleNamespace(case=SimpleNamespace(dropout=0), q=q, k=k, v=v, sinks=sinks, problem=problem, dlse=None)


def check_results(call, out, lse=None):
    """Within twice what plain PyTorch loses in the same dtype, against float64."""
    with torch.device(call.q.device):
        if lse is not None:
            checks.check_results(call, out, lse)
            return
        truth, budget = (checks.oracle(call, dtype)[0] for dtype in (torch.float64, out.dtype))
        reference.assert_close("out", out, truth, budget, 2, reference.floor_of(out.dtype, truth.abs().max().item()))


def check_gradients(call, gradients, dout):
    call.dout = dout
    with torch.device(call.q.device):
        truth, budget = (checks.oracle_gradients(call, dtype, False) for dtype in (torch.float64, call.q.dtype))
        scales = reference.gradient_scales(call.problem, call.q, call.k, call.v, call.sinks, dout, None)
        for name, actual, *expected, scale in zip(("dq", "dk", "dv"), gradients, truth, budget, scales, strict=False):
            floor = reference.floor_of(call.q.dtype, scale)
            reference.assert_close(name, actual.to(call.q.dtype), *expected, 3, floor)


def as_exact(ours, theirs, exact):
    """A model's result: no further from the float32 one than twice the other result in a half type."""
    assert ours.isfinite().all(), "a result is not finite"
    ours, theirs = ((x.float() - exact).abs().max().item() for x in (ours, theirs))
    allowed = 2 * theirs + 1e-3 * exact.abs().max().item()
    assert ours <= allowed, f"error {ours:.3g} > {allowed:.3g}"
