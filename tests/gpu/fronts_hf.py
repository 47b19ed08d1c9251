"""Transformers on a GPU in bfloat16: attn_implementation "strobe", and the drop-ins behind its own flash names."""

import functools
import os
import sys

import torch
from fronts import ROOT, as_exact, needs
from scenario import Skip, scenario

FAMILIES = ("llama", "qwen3", "qwen3_sliding", "mistral", "gemma2", "gemma3", "gpt_oss", "deepseek")
# q and k of 16 + 8 = 24, v of 16.
DEEPSEEK = dict(first_k_dense_replace=4, qk_nope_head_dim=16, v_head_dim=16)
# bfloat16 tips a router's choice now and then, and all of a token with it.
CHANGES = {"gpt_oss": dict(head_dim=16, num_local_experts=1), "deepseek": DEEPSEEK}
RECIPE = dict(window=8, keep_first=2, force_fa_decode=True, full_layers=[1])
LAYERS = [(None, 0, False) if n == 1 else (8, 2, True) for n in range(4)]  # (window, keep_first, full rows)


def _models():
    needs("transformers")
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
    folder = str(ROOT / "tests" / "hf")
    if folder not in sys.path:
        sys.path.append(folder)
    import small_models

    import strobe.hf

    strobe.hf.register()
    return small_models


def _three_times(models, model, names, call):
    """Results of the float32 model with eager attention, the bfloat16 one with it, and the bfloat16 one with ours."""
    results = []
    for name, dtype in zip(names, (torch.float32, torch.bfloat16, torch.bfloat16), strict=True):
        models.using(model.to(dtype), name).zero_grad()
        results.append(call(model))
    return zip(*results, strict=True)


def _logits_and_gradients(models, family, side, name):
    with torch.device("cpu"):
        ids, mask = models.tokens(3, 70), models.padding(70, 9, 0, 33, side=side)
        model = models.build(family, **CHANGES.get(family, dict(head_dim=16)))
    model, ids, mask = model.to("cuda"), ids.to("cuda"), mask.to("cuda")
    real = mask.bool()

    def call(model):
        logits = model(input_ids=ids, attention_mask=mask).logits
        logits[real].float().pow(2).mean().backward()
        return logits.detach()[real].float(), model.lm_head.weight.grad.float().clone()

    for exact, theirs, ours in _three_times(models, model, ("eager", "eager", name), call):
        as_exact(ours, theirs, exact)


@scenario([dict(family=f, side=s) for f in FAMILIES for s in ("left", "right")])
def logits_and_gradients(strobe, family, side):
    _logits_and_gradients(_models(), family, side, "strobe")


@scenario([dict(version=v, family=f) for v in (2, 3) for f in ("llama", "mistral", "gemma2")])
def drop_in_behind_flash_attention(strobe, version, family):
    """The distributions of compat/ are what Transformers finds under its own names."""
    models = _models()
    from transformers import modeling_flash_attention_utils as flash

    name = f"flash_attention_{version}"
    found = flash._lazy_imports(name)
    module = __import__({2: "flash_attn", 3: "flash_attn_interface"}[version])
    assert found[0] is module.flash_attn_func and found[1] is module.flash_attn_varlen_func, found
    _logits_and_gradients(models, family, "right", name)


def _with_reference(models, model, expected, call):
    """The three results of `call`, the eager ones with every layer's mask written out."""
    import eager_reference

    results = []
    for dtype in (torch.float32, torch.bfloat16):
        with torch.device("cuda"):
            results.append(call(lambda **k: eager_reference.run(model.to(dtype), expected, **k)))
        expected.calls.clear()
    results.append(call(models.using(model, "strobe")))
    return zip(*results, strict=True)


@scenario([dict(family=f, side=s) for f in ("llama", "deepseek") for s in ("left", "right")])
def training_with_a_window_and_full_rows(strobe, family, side):
    """Window, kept tokens and, from a column of each row on, full attention."""
    models = _models()
    from eager_reference import Expected

    with torch.device("cpu"):
        model, ids = models.build(family, **CHANGES.get(family, dict(head_dim=16))), models.tokens(3, 70)
        mask = models.padding(70, 9, 0, 33, side=side)
    model, ids, mask = model.to("cuda"), ids.to("cuda"), mask.to("cuda")
    strobe.hf.apply(model, **RECIPE)
    answer = torch.tensor([40, 31, 36], device="cuda")
    place = (mask.cumsum(1) - 1).clamp(min=0)

    def call(forward):
        model.zero_grad()
        more = dict(full_from=answer) if forward is model else {}
        logits = forward(input_ids=ids, attention_mask=mask, position_ids=place, **more).logits
        logits[mask.bool()].float().pow(2).mean().backward()
        return logits.detach()[mask.bool()].float(), model.lm_head.weight.grad.float().clone()

    for exact, theirs, ours in _with_reference(models, model, Expected(LAYERS, mask, answer), call):
        as_exact(ours, theirs, exact)


@scenario([dict(cache=c, compiled=x) for c, x in (("dynamic", False), ("static", False), ("static", True))])
def generation_token_by_token(strobe, cache, compiled):
    """A window in the prompt, full attention after it. Compiled, Transformers decodes in CUDA graphs."""
    models = _models()
    from eager_reference import Expected

    torch._dynamo.reset()
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with torch.device("cpu"):
        model, ids = models.build("llama", hidden_size=64), models.tokens(2, 40)
        mask = models.padding(40, 11, 0, side="left")
    model, ids, mask = model.to("cuda", torch.bfloat16), ids.to("cuda"), mask.to("cuda")
    strobe.hf.apply(model, **RECIPE)
    made = model.generate(
        ids, attention_mask=mask, max_new_tokens=12, do_sample=False, cache_implementation=cache,
        disable_compile=not compiled, return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    if compiled:
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > graphs, "nothing was compiled"
    whole = torch.nn.functional.pad(mask, (0, 11), value=1)
    place = (whole.cumsum(1) - 1).clamp(min=0)
    expected = Expected(LAYERS, whole, torch.full((2,), 40, device="cuda"))
    ours = torch.stack(made.logits, 1).float()

    def call(forward):
        if forward is model:
            return (ours,)
        with torch.no_grad():
            logits = forward(input_ids=made.sequences[:, :-1], attention_mask=whole, position_ids=place).logits
        return (logits[:, 39:].float(),)

    for exact, theirs, ours in _with_reference(models, model, expected, call):
        as_exact(ours, theirs, exact)


def _fill_before_use():
    """Transformers 5.17 fills a generation's buffers on one stream and uses them on others, and nothing orders the two.

    Its loop clears them once more as it begins. While the GPU is busy with other work the zeros arrive after the first
    inputs, whatever attends: a decoder in plain PyTorch went wrong in the same way.
    """
    from transformers.generation.continuous_batching.input_outputs import ContinuousBatchingAsyncIOs as Buffers

    def filled(method):
        @functools.wraps(method)
        def call(self, *args, **kwargs):
            method(self, *args, **kwargs)
            torch.cuda.synchronize()

        return call

    if not hasattr(Buffers.reset, "__wrapped__"):
        Buffers.__init__, Buffers.reset = filled(Buffers.__init__), filled(Buffers.reset)


@scenario([dict(family=f, name=n) for f in ("llama", "gemma2") for n in ("paged|strobe", "strobe_flash_3")])
def continuous_batching(strobe, family, name):
    models = _models()
    from transformers import ContinuousBatchingConfig, GenerationConfig

    strobe.hf.register(patch=True)
    _fill_before_use()
    with torch.device("cpu"):
        model = models.build(family, head_dim=16)
        prompts = [models.tokens(1, n)[0].tolist() for n in (5, 13, 61)]
    model = model.to("cuda", torch.bfloat16)
    settings = GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=-1, pad_token_id=0)
    batching = ContinuousBatchingConfig(num_blocks=32, block_size=16, max_batch_tokens=128)
    made = models.using(model, name).generate_batch(prompts, settings, batching).values()
    assert len(made) == len(prompts)
    models.using(model.float(), "eager")
    for out in made:
        assert len(out.generated_tokens) == 8
        ids = torch.tensor([out.prompt_ids + out.generated_tokens], device="cuda")
        with torch.no_grad():
            logits = model(ids).logits[0, len(out.prompt_ids) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(out.generated_tokens, device="cuda")[:, None])[:, 0]
        behind = (logits.amax(1) - chosen).max().item()
        # The best token, or one as good in bfloat16.
        assert behind < 0.1, f"{behind:.3f} behind the best: {out.generated_tokens}"


@scenario()
def on_the_second_gpu(strobe):
    """The model's device counts, not the current one."""
    models = _models()
    if torch.cuda.device_count() < 2:
        raise Skip("one GPU")
    with torch.device("cpu"):
        model, ids = models.build("llama", head_dim=16), models.tokens(2, 70)
    results = []
    for device in ("cuda:0", "cuda:1"):
        models.using(model.to(device, torch.bfloat16), "strobe")
        with torch.no_grad():
            results.append(model(ids.to(device)).logits.cpu())
    assert torch.cuda.current_device() == 0
    assert torch.equal(*results)
