"""How DTensor shards attention: over heads or over the batch, without communication."""

import sys

import torch
from torch import Tensor

from strobe._extension import Side

_registered = False


def distributed(function: str, q, k, v, s_aux, side: Side, dropout_p: float):
    """s_aux and side as q, k and v are: replicated DTensors if those are DTensors. Registers the rules when needed."""
    module = sys.modules.get("torch.distributed.tensor")  # importing strobe does not import torch.distributed
    if module is None or not any(isinstance(t, module.DTensor) for t in (q, k, v)):
        return s_aux, side
    if dropout_p > 0:
        raise NotImplementedError(f"{function}: dropout of DTensors is not implemented, dropout_p is {dropout_p}")
    for name, t in (("q", q), ("k", k), ("v", v)):
        if not isinstance(t, module.DTensor):
            raise TypeError(f"{function}: {name} is a {type(t).__name__}, it takes a DTensor as the others of q, k, v")
    _register(module)
    mesh = q.device_mesh

    def replicated(t):
        if not isinstance(t, Tensor) or isinstance(t, module.DTensor):
            return t
        return module.DTensor.from_local(t, mesh, [module.Replicate()] * mesh.ndim, run_check=False)

    return replicated(s_aux), Side(*map(replicated, side))


def _register(module) -> None:
    global _registered
    if _registered:
        return
    from torch.distributed.tensor.experimental import register_sharding

    names = len(Side._fields)

    def placements(kind, q, side):
        """Placement by name of one mesh dimension; `kind` is None (replicated), "heads" or "batch"."""
        dense = len(q.shape) == 4
        whole = module.Replicate()
        rows = lse = sink = whole
        by_name = dict.fromkeys(Side._fields, whole)
        alibi = side[Side._fields.index("alibi_slopes")]
        if kind == "heads":
            rows, lse, sink = module.Shard(2 if dense else 1), module.Shard(1 if dense else 0), module.Shard(0)
            if alibi is not None:
                by_name["alibi_slopes"] = module.Shard(len(alibi.shape) - 1)
        elif kind == "batch":
            rows = lse = module.Shard(0)
            by_name = dict.fromkeys(Side._fields, module.Shard(0))
            if alibi is not None and len(alibi.shape) == 1:
                by_name["alibi_slopes"] = whole
        placed = [None if t is None else by_name[name] for name, t in zip(Side._fields, side, strict=True)]
        return rows, lse, sink, placed

    def kinds(q, k, v, s_aux, side):
        size = q.mesh.size()
        allowed = [None]
        if all(t.shape[-2] % size == 0 for t in (q, k, v)):
            allowed.append("heads")
        given = {name for name, t in zip(Side._fields, side, strict=True) if t is not None}
        if len(q.shape) == 4 and s_aux is None and not given & {"page_table", "cache_batch_idx"}:
            if q.shape[0] % size == 0:
                allowed.append("batch")
        return allowed

    @register_sharding(torch.ops.strobe.fwd.default)
    def forward(q, k, v, s_aux, *rest):
        side, scalars = rest[:names], [None] * (len(rest) - names)
        strategies = []
        for kind in kinds(q, k, v, s_aux, side):
            rows, lse, sink, placed = placements(kind, q, side)
            strategies.append(([rows, lse], [rows, rows, rows, None if s_aux is None else sink, *placed, *scalars]))
        return strategies

    @register_sharding(torch.ops.strobe.bwd.default)
    def backward(dout, dlse, q, k, v, out, lse, s_aux, *rest):
        side, scalars = rest[:names], [None] * (len(rest) - names)
        strategies = []
        for kind in kinds(q, k, v, s_aux, side):
            rows, row, sink, placed = placements(kind, q, side)
            inputs = [rows, None if dlse is None else row, rows, rows, rows, rows, row, None if s_aux is None else sink]
            # Without s_aux its gradient is an empty tensor, the same on every rank.
            outputs = [rows, rows, rows, module.Replicate() if s_aux is None else sink]
            strategies.append((outputs, [*inputs, *placed, *scalars]))
        return strategies

    _registered = True
