"""The systems on a GPU, as functions (task, inputs) -> Prepared, or None where a system cannot do the task.

Everything but the call is done before the clock runs, also what a system needs other shapes for (FlashAttention 2's
padding). Results come back as Strobe's: [batch, seqlen, heads, dim], packed [total, heads, dim].
"""

import ctypes
import dataclasses
import functools
import hashlib
import importlib.metadata
import os
import sys
import warnings
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import strobe
from bench.gpu_inputs import out_of_pages
from bench.peers import Prepared, prepared

ROOT = Path(__file__).parents[1]
PEERS = Path(os.environ.get("STROBE_PEERS", ROOT / "build" / "peers"))
HOST = ("host", "host_grad")


def plain(*results):
    return results


def has_window(case):
    return case.window != (-1, -1)


def right_of(case):
    return 0 if case.causal else case.window[1]


# Strobe


def strobe_on(backend, task, inputs):
    case = task.case
    mask = dict(causal=case.causal, window_size=case.window, keep_first=case.keep_first)
    options = dict(**mask, softcap=case.softcap, backend=backend)
    if task.kind in HOST:  # as a user writes it
        options = {} if backend is None else dict(backend=backend)
    if task.kind in ("decode", "append"):
        options |= dict(cache_seqlens=inputs.seqused_k, page_table=inputs.page_table)
        if task.kind == "append":
            options |= dict(k=inputs.k_new, v=inputs.v_new, rotary_cos=inputs.cos, rotary_sin=inputs.sin)
            options |= dict(rotary_interleaved=False)

        def attend(q, k, v):
            return strobe.flash_attn_with_kvcache(q, k, v, **options)
    elif inputs.cu_seqlens is not None:
        lengths = (inputs.cu_seqlens, inputs.cu_seqlens, max(case.seqlens_q), max(case.seqlens_k))

        def attend(q, k, v):
            return strobe.flash_attn_varlen_func(q, k, v, *lengths, **options)
    else:

        def attend(q, k, v):
            return strobe.flash_attn_func(q, k, v, **options)

    return prepared(task.kind, attend, (inputs.q, inputs.k, inputs.v), inputs.dout, plain)


def strobe_plain(task, inputs):
    """A prompt whose keys lie in pages, with its keys in tensors: what pages cost."""
    if task.suite != "pages":
        return None
    k, v = (out_of_pages(x, inputs.page_table) for x in (inputs.k, inputs.v))
    plain_inputs = dataclasses.replace(inputs, k=k, v=v, seqused_k=None, page_table=None)
    return strobe_on(None, dataclasses.replace(task, kind="forward"), plain_inputs)


# PyTorch's scaled_dot_product_attention


def sdpa_with(backend, task, inputs):
    """On views of the [batch, seqlen, heads, dim] tensors, which both backends take as they are; caches as theirs."""
    case = task.case
    if case.page_size or inputs.cu_seqlens is not None or has_window(case) or task.kind == "append":
        return None
    if case.causal and case.seqlens_q != case.seqlens_k and max(case.seqlens_q) > 1:
        return None  # is_causal aligns other lengths at the top left
    tensors = [x.transpose(1, 2) for x in (inputs.q, inputs.k, inputs.v)]
    if task.kind == "decode":
        tensors = [x.contiguous() for x in tensors]
    dout = None if inputs.dout is None else inputs.dout.transpose(1, 2)
    options = dict(
        is_causal=case.causal and max(case.seqlens_q) > 1,
        enable_gqa=case.heads != case.heads_k,
        scale=case.head_dim**-0.5,
    )

    def attend(q, k, v):
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, **options)

    return prepared(task.kind, attend, tensors, dout, lambda *all: tuple(x.transpose(1, 2) for x in all))


def cudnn(task, inputs):
    return None if task.kind in HOST else sdpa_with(SDPBackend.CUDNN_ATTENTION, task, inputs)


def sdpa(task, inputs):
    """The call as a user writes it, with PyTorch's own choice: only its host time is taken."""
    if task.kind not in HOST:
        return None
    tensors = [x.transpose(1, 2) for x in (inputs.q, inputs.k, inputs.v)]
    return prepared(task.kind, scaled_dot_product_attention, tensors, None, lambda x: (x.transpose(1, 2),))


def padded(x, dim):
    return torch.nn.functional.pad(x, (0, dim - x.shape[-1]))


def fa2(task, inputs):
    """FlashAttention 2 as PyTorch ships it. It knows one head dim: the smaller one is padded with zeros."""
    case = task.case
    if task.kind in HOST:
        return None
    if case.head_dim != case.head_dim_v:
        return fa2_padded(task, inputs)
    if inputs.cu_seqlens is None and not has_window(case):
        return sdpa_with(SDPBackend.FLASH_ATTENTION, task, inputs)
    if case.keep_first or task.kind not in ("forward", "backward"):
        return None
    # What SDPA's backend calls has packed sequences and windows, too.
    q_length, k_length = max(case.seqlens_q), max(case.seqlens_k)
    window = {}
    if has_window(case):
        window = dict(window_size_left=case.window[0], window_size_right=right_of(case))

    def attend(q, k, v):
        return torch.ops.aten._flash_attention_forward(
            q, k, v, inputs.cu_seqlens, inputs.cu_seqlens, q_length, k_length, 0.0, case.causal, False, **window
        )[0]

    return prepared(task.kind, attend, (inputs.q, inputs.k, inputs.v), inputs.dout, plain)


def fa2_padded(task, inputs):
    case = task.case
    dim = max(case.head_dim, case.head_dim_v)
    wide = type(inputs)(**vars(inputs))
    for name in ("q", "k", "v", "dout"):
        if getattr(inputs, name) is not None:
            setattr(wide, name, padded(getattr(inputs, name), dim))
    found = sdpa_with(SDPBackend.FLASH_ATTENTION, task, wide)
    if found is None:
        return None
    dims = [case.head_dim, case.head_dim, case.head_dim_v] if task.kind == "backward" else [case.head_dim_v]
    whole = found.results
    found.results = lambda returned: tuple(x[..., :d] for x, d in zip(whole(returned), dims, strict=True))
    return found


@functools.cache
def compiled_flex():
    import torch._functorch.config
    from torch.nn.attention.flex_attention import flex_attention

    torch._functorch.config.donated_buffer = False  # the graph is kept: the gradient call is timed alone
    return torch.compile(flex_attention, dynamic=False)


def flex(task, inputs):
    """FlexAttention, for windows: the block mask is made before the clock runs."""
    case = task.case
    if task.kind not in ("forward", "backward") or inputs.cu_seqlens is not None or not has_window(case):
        return None
    assert case.causal and case.seqlens_q == case.seqlens_k
    from torch.nn.attention.flex_attention import create_block_mask

    left, kept, length = case.window[0], case.keep_first, case.seqlens_q[0]

    def visible(b, h, i, j):
        return (j <= i) & ((i - j <= left) | (j < kept))

    mask = create_block_mask(visible, None, None, length, length, device=str(inputs.q.device))
    attention, gqa = compiled_flex(), case.heads != case.heads_k
    tensors = [x.transpose(1, 2) for x in (inputs.q, inputs.k, inputs.v)]

    def attend(q, k, v):
        return attention(q, k, v, block_mask=mask, enable_gqa=gqa)

    dout = inputs.dout.transpose(1, 2)
    return prepared(task.kind, attend, tensors, dout, lambda *all: tuple(x.transpose(1, 2) for x in all))


# FlashAttention 3: the operators of a prebuilt library, without the Python front


def load_fa3():
    folder = PEERS / "fa3"
    ctypes.CDLL(str(folder / "libcudart.so.12"), ctypes.RTLD_GLOBAL)
    torch.ops.load_library(folder / "_C.so")
    with open(folder / "_C.so", "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return f"prebuilt operators, sha256 {digest[:12]}"


def fa3(task, inputs):
    case = task.case
    if task.kind in HOST or case.keep_first:
        return None
    options = dict(is_causal=case.causal, window_size_left=case.window[0], window_size_right=right_of(case))
    if inputs.cu_seqlens is not None:
        options |= dict(cu_seqlens_q=inputs.cu_seqlens, cu_seqlens_k=inputs.cu_seqlens)
        options |= dict(max_seqlen_q=max(case.seqlens_q), max_seqlen_k=max(case.seqlens_k))
    cache = dict(seqused_k=inputs.seqused_k, page_table=inputs.page_table)
    if task.kind == "append":
        cache |= dict(k_new=inputs.k_new, v_new=inputs.v_new, rotary_cos=inputs.cos, rotary_sin=inputs.sin)
    q, k, v = inputs.q, inputs.k, inputs.v
    ops = torch.ops.flash_attn_3
    if task.kind != "backward":
        return Prepared(lambda: ops.fwd(q, k, v, **cache, **options), lambda all: (all[0],))
    out, lse, *_ = ops.fwd(q, k, v, **options)
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))

    def call():
        ops.bwd(inputs.dout, q, k, v, out, lse, dq, dk, dv, **options)
        return dq, dk, dv

    return Prepared(call, lambda all: all)


# FlashAttention 4: its public wheels, unpacked


def load_fa4():
    # At the end of the path: what PyTorch and NumPy are must not change.
    for folder in (PEERS / "fa4", PEERS / "fa4" / "nvidia_cutlass_dsl" / "dsl_packages"):
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
    from flash_attn.cute.interface import flash_attn_func  # noqa: F401

    # Said at every compilation; it would drown the tables.
    warnings.filterwarnings("ignore", message="Argument .* cannot be converted to a JitArgument")
    return importlib.metadata.version("flash-attn-4")


def fa4(task, inputs):
    case = task.case
    if case.keep_first or task.kind == "append":
        return None
    from flash_attn.cute.interface import flash_attn_func, flash_attn_varlen_func

    options = {}
    if task.kind not in HOST:
        left, right = (None if side < 0 else side for side in (case.window[0], right_of(case)))
        options = dict(causal=case.causal)
        if has_window(case):
            options = dict(causal=False, window_size=(left, right))
    function = flash_attn_func
    if inputs.cu_seqlens is not None:
        function = flash_attn_varlen_func
        options |= dict(cu_seqlens_q=inputs.cu_seqlens, cu_seqlens_k=inputs.cu_seqlens)
        options |= dict(max_seqlen_q=max(case.seqlens_q), max_seqlen_k=max(case.seqlens_k))
    if task.kind == "decode" and inputs.page_table is not None:
        function = flash_attn_varlen_func
        options |= dict(seqused_k=inputs.seqused_k, page_table=inputs.page_table)

    def attend(q, k, v):
        result = function(q, k, v, **options)
        return result[0] if isinstance(result, tuple) else result

    return prepared(task.kind, attend, (inputs.q, inputs.k, inputs.v), inputs.dout, plain)


SYSTEMS = {  # Strobe first: "strobe" is its planner's choice
    "strobe": functools.partial(strobe_on, None),
    "strobe-plain": strobe_plain,
    "strobe-sm80": functools.partial(strobe_on, "sm80"),
    "sdpa": sdpa,
    "fa2": fa2,
    "cudnn": cudnn,
    "flex": flex,
    "fa3": fa3,
    "fa4": fa4,
}

LOAD = {"fa3": load_fa3, "fa4": load_fa4}


@functools.cache
def load(name):
    """(version or "", why it is not there or ""), loaded once."""
    try:
        return (LOAD[name]() if name in LOAD else "", "")
    except Exception as error:
        return "", f"{type(error).__name__}: {error}".splitlines()[0]
