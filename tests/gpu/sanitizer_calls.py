"""A small matrix of every kernel, for compute-sanitizer: sanitizer_calls.py ENGINE. Values are compared elsewhere."""

import sys

import torch

import strobe


def randn(*shape, dtype=torch.float32):
    """Copied to the GPU: what kernels of torch's write is unknown to initcheck, which watches Strobe's alone."""
    return torch.randn(shape).to(dtype).cuda()


def ints(*values):
    return torch.tensor(values, dtype=torch.int32).cuda()


def shuffled(*shape):
    return torch.randperm(torch.Size(shape).numel()).int().view(shape).cuda()


def attend(engine, dtype, dims, lengths, heads=(4, 2, 2), grad=True, **options):
    q, k, v = (
        randn(2, n, h, d, dtype=dtype).requires_grad_(grad)
        for n, h, d in zip((lengths[0], lengths[1], lengths[1]), heads, (dims[0], *dims), strict=True)
    )
    leaves = [q, k, v]
    if options.pop("alibi", False):
        options["alibi_slopes"] = randn(heads[0])
    if options.pop("sinks", False):
        options["s_aux"] = randn(heads[0]).requires_grad_(grad)
        leaves.append(options["s_aux"])
    out, lse, _ = strobe.flash_attn_func(q, k, v, backend=engine, return_attn_probs=True, **options)
    if grad:
        torch.autograd.grad((out, lse), leaves, (randn(*out.shape, dtype=dtype), randn(*lse.shape)))


def packed(engine, dtype, dims, deterministic):
    lengths = (0, 33, 33, 130)
    q, k, v = (randn(130, h, d, dtype=dtype).requires_grad_() for h, d in ((4, dims[0]), (2, dims[0]), (1, dims[1])))
    cu = ints(*lengths)
    out = strobe.flash_attn_varlen_func(
        q, k, v, cu, cu, 97, 97, causal=True, window_size=(20, 0), keep_first=2, seqused_k=ints(30, 0, 90),
        leftpad_k=ints(0, 0, 7), full_from=ints(9, 9, 50), deterministic=deterministic, backend=engine,
    )  # fmt: skip
    torch.autograd.grad(out, (q, k, v), randn(*out.shape, dtype=dtype))


def paged(engine, dtype, dims, queries):
    q = randn(2 * queries, 4, dims[0], dtype=dtype)
    k, v = randn(30, 16, 2, dims[0], dtype=dtype), randn(30, 16, 2, dims[1], dtype=dtype)
    table = shuffled(2, 15)
    cu = ints(0, queries, 2 * queries)
    strobe.flash_attn_varlen_func(
        q, k, v, cu, None, queries, 240, causal=True, window_size=(30, 0), keep_first=3, seqused_k=ints(200, 37),
        page_table=table, backend=engine,
    )  # fmt: skip


def decode(engine, dtype, dims, pages, queries=1, splits=0):
    lead = (80, 16) if pages else (2, 640)
    caches = [randn(*lead, 2, d, dtype=dtype) for d in dims]
    new = [randn(2, queries, 2, d, dtype=dtype) for d in dims]
    cos, sin = randn(700, 16, dtype=dtype), randn(700, 16, dtype=dtype)
    strobe.flash_attn_with_kvcache(
        randn(2, queries, 8, dims[0], dtype=dtype), *caches, *new, cos, sin, cache_seqlens=ints(600, 5),
        block_table=shuffled(2, 40) if pages else None, causal=True,
        num_splits=splits, backend=engine,
    )  # fmt: skip


def calls(engine):
    for dtype in (torch.bfloat16, torch.float16):
        for dims in ((64, 64), (128, 128), (40, 72)):
            yield attend, (engine, dtype, dims, (130, 150)), dict(causal=True)
            yield packed, (engine, dtype, dims, dtype == torch.float16), {}
            yield paged, (engine, dtype, dims, 70), {}
            yield decode, (engine, dtype, dims, dtype == torch.bfloat16), {}
    bf16 = torch.bfloat16
    for dims in ((192, 128), (256, 256), (64, 256)):
        yield attend, (engine, bf16, dims, (70, 90)), dict(window_size=(20, 5), keep_first=4, deterministic=True)
        yield decode, (engine, bf16, dims, True), dict(queries=3)
        # Few kept tokens and many queries: their gradients have kernels of their own.
        yield attend, (engine, bf16, dims, (600, 600)), dict(causal=True, window_size=(40, 0), keep_first=4)
    for dims in ((64, 64), (128, 128)):
        yield attend, (engine, bf16, dims, (600, 600)), dict(causal=True, window_size=(90, 0), keep_first=4, grad=False)
    for dims in ((128, 256), (256, 256)):  # blocks work in pairs
        yield attend, (engine, bf16, dims, (4500, 70)), dict(grad=False)
    changes = dict(softcap=20.0), dict(alibi=True), dict(dropout_p=0.2), dict(sinks=True), dict(deterministic=True)
    for change in changes:
        yield attend, (engine, bf16, (64, 64), (130, 150)), change
    yield attend, (engine, bf16, (64, 64), (90, 90)), dict(heads=(6, 2, 3))
    yield attend, (engine, bf16, (64, 64), (90, 90)), dict(heads=(8, 1, 1))
    for queries in (5, 9):
        yield decode, (engine, bf16, (128, 128), False), dict(queries=queries)
    for dims in ((512, 512), (576, 512)):
        yield attend, (engine, bf16, dims, (20, 70)), dict(grad=False)


def main():
    engine, done, refused = sys.argv[1], 0, 0
    for call, arguments, options in calls(engine):
        try:
            call(*arguments, **options)
        except NotImplementedError:
            refused += 1  # by an engine that does not serve all
        torch.cuda.synchronize()
        done += 1
    print(f"{done} calls, {refused} refused")


if __name__ == "__main__":
    main()
