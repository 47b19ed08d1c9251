"""Attention of DTensors over two processes; prints "same" once per process. Run by test_torch_routes.py."""

import os
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

WORLD = 2


def check(strobe, mesh, placement, **options):
    torch.manual_seed(0)
    whole = [torch.randn(2, 9, heads, 16, requires_grad=True) for heads in (4, 2, 4)]
    expected = strobe.flash_attn_func(*whole, causal=True, **options)
    gradients = torch.autograd.grad(expected.square().sum(), whole)
    shards = [distribute_tensor(x.detach(), mesh, [placement]).requires_grad_() for x in whole]
    with CommDebugMode() as communication:
        out = strobe.flash_attn_func(*shards, causal=True, **options)
        ours = torch.autograd.grad(out, shards, 2 * out.detach())
    assert communication.get_total_counts() == 0, communication.get_comm_counts()
    assert out.placements == (placement,)
    assert torch.equal(out.full_tensor(), expected)
    for a, b in zip(ours, gradients, strict=True):
        assert a.placements == (placement,)
        torch.testing.assert_close(a.full_tensor(), b, rtol=1e-5, atol=1e-6)


def refuses(error, text, call):
    try:
        call()
    except error as raised:
        assert text in str(raised), raised
    else:
        raise AssertionError(f"not refused: {text}")


def run(rank: int, store: str) -> None:
    import strobe

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    mesh = init_device_mesh("cpu", (WORLD,))
    for placement in (Shard(2), Shard(0), Replicate()):
        check(strobe, mesh, placement)
        check(strobe, mesh, placement, window_size=(3, 0), keep_first=2, full_from=5)
    check(strobe, mesh, Shard(2), s_aux=torch.arange(4.0), alibi_slopes=torch.tensor([0.5, 0.25, 0.1, 0.0]))
    q = distribute_tensor(torch.randn(2, 9, 4, 16), mesh, [Shard(2)])
    refuses(NotImplementedError, "dropout", lambda: strobe.flash_attn_func(q, q, q, dropout_p=0.1))
    refuses(TypeError, "k is a Tensor", lambda: strobe.flash_attn_func(q, q.full_tensor(), q))
    dist.barrier()  # nobody leaves while another still talks
    dist.destroy_process_group()
    print("same", flush=True)
    os._exit(0)  # gloo's own threads abort one exit in ten


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(run, args=(f"{folder}/store",), nprocs=WORLD)
