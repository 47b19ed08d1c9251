"""The same on a GPU, in bfloat16: models, continuous batching, compiled generation, and Strobe behind torch's flash."""

import pytest
import small_models as models
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import ContinuousBatchingConfig, GenerationConfig

import strobe.hf
from strobe import torch_sdpa

DEVICE = "cuda"
# bfloat16 tips a router's choice now and then, and all of a token with it.
ONE_EXPERT = {"gpt_oss": dict(head_dim=16, num_local_experts=1), "deepseek": dict(first_k_dense_replace=4)}


def error(result, exact) -> float:
    return (result.float() - exact).abs().max().item()


def assert_as_exact(ours, theirs, exact):
    """No further from the float32 result than twice the other bfloat16 result."""
    assert ours.isfinite().all()
    assert error(ours, exact) <= 2 * error(theirs, exact) + 1e-3 * exact.abs().max().item()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", models.CONFIGS)
def test_logits_and_gradients(family, side):
    ids, mask = models.tokens(3, 70).to(DEVICE), models.padding(70, 9, 0, 33, side=side).to(DEVICE)
    model = models.build(family, **ONE_EXPERT.get(family, dict(head_dim=16))).to(DEVICE)
    real, results = mask.bool(), []
    for name, dtype in (("eager", torch.float32), ("eager", torch.bfloat16), ("strobe", torch.bfloat16)):
        models.using(model.to(dtype), name).zero_grad()
        logits = model(input_ids=ids, attention_mask=mask).logits
        logits[real].float().pow(2).mean().backward()
        results.append((logits.detach()[real].float(), model.lm_head.weight.grad.float().clone()))
    for exact, theirs, ours in zip(*results, strict=True):
        assert_as_exact(ours, theirs, exact)


@pytest.mark.parametrize("compiled", [False, True])
def test_generation_with_a_window_and_a_static_cache(compiled):
    """Compiled, Transformers decodes in CUDA graphs."""
    model, ids = models.build("llama", hidden_size=64).to(DEVICE, torch.bfloat16), models.tokens(2, 40).to(DEVICE)
    strobe.hf.apply(model, window=8, keep_first=2, force_fa_decode=True, full_layers=[1])
    call = dict(attention_mask=models.padding(40, 11, 0, side="left").to(DEVICE), max_new_tokens=12, do_sample=False)
    call |= dict(return_dict_in_generate=True, output_logits=True)
    dynamic = model.generate(ids, **call)
    static = model.generate(ids, **call, cache_implementation="static", disable_compile=not compiled)
    same = (dynamic.sequences == static.sequences).all(0)  # until bfloat16 tips a token
    steps = int(same.long().cumprod(0).sum()) - 40
    assert steps >= 1
    for a, b in zip(dynamic.logits[:steps], static.logits[:steps], strict=True):
        torch.testing.assert_close(a, b, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_continuous_batching(family):
    strobe.hf.register(patch=True)
    model = models.build(family, head_dim=16).to(DEVICE, torch.bfloat16)
    prompts = [models.tokens(1, n)[0].tolist() for n in (5, 13, 61)]
    settings = GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=-1, pad_token_id=0)
    batching = ContinuousBatchingConfig(num_blocks=32, block_size=16, max_batch_tokens=128)
    models.using(model, "strobe_flash_3")
    made = model.generate_batch(prompts, settings, batching).values()
    models.using(model, "strobe")
    for out in made:
        ids = torch.tensor([out.prompt_ids + out.generated_tokens], device=DEVICE)
        logits = model(ids).logits[0, len(out.prompt_ids) - 1 : -1].float()
        chosen = logits.gather(1, torch.tensor(out.generated_tokens, device=DEVICE)[:, None])[:, 0]
        assert (logits.amax(1) - chosen).max() < 0.1  # the best token, or one as good in bfloat16


@pytest.fixture
def active():
    calls = []
    inner = torch_sdpa._forward

    def counted(*arguments, **options):
        calls.append(arguments)
        return inner(*arguments, **options)

    torch_sdpa._forward = counted
    torch_sdpa.activate()
    yield calls
    torch_sdpa.deactivate()
    torch_sdpa._forward = inner


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
def test_sdpa_is_strobe(active, is_causal, compiled):
    q, k, v = (torch.randn(2, 4, 130, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    dout, results = torch.randn_like(q), []

    def call(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)

    for backend, cast in ((SDPBackend.MATH, True), (SDPBackend.MATH, False), (SDPBackend.FLASH_ATTENTION, False)):
        with sdpa_kernel(backend):
            function = torch.compile(call, fullgraph=True) if compiled and backend != SDPBackend.MATH else call
            inputs = [x.float() if cast else x for x in (q, k, v)]
            out = function(*inputs)
            gradients = torch.autograd.grad(out, inputs, dout.to(out.dtype))
        results.append([x.detach().float() for x in (out, *gradients)])
    assert len(active) == 1
    for exact, theirs, ours in zip(*results, strict=True):
        assert_as_exact(ours, theirs, exact)


def test_varlen_attn_is_strobe(active):
    from torch.nn.attention.varlen import varlen_attn

    lengths = [70, 1, 129]
    ends = torch.tensor([0, 70, 71, 200], device=DEVICE, dtype=torch.int32)
    q, k, v = (torch.randn(200, 4, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    out = varlen_attn(q, k, v, ends, ends, 129, 129, window_size=(-1, 0))
    assert len(active) == 1
    dout = torch.randn_like(out)
    ours = (out, *torch.autograd.grad(out, (q, k, v), dout))
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        inputs = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        parts = zip(*(x.split(lengths) for x in inputs), strict=True)
        with sdpa_kernel(SDPBackend.MATH):
            each = [F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in p), is_causal=True) for p in parts]
        whole = torch.cat([x.transpose(0, 1) for x in each])
        results.append([x.detach().float() for x in (whole, *torch.autograd.grad(whole, inputs, dout.to(dtype)))])
    for mine, exact, theirs in zip(ours, *results, strict=True):
        assert_as_exact(mine.detach().float(), theirs, exact)
