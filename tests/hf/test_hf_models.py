"""Every family of models under "strobe" and under "eager": logits, gradients, generation, padding and packing."""

import pytest
import small_models as models
import torch

LENGTH = 21
FAMILIES = list(models.CONFIGS)


def both(model, **call):
    with torch.no_grad():
        return [models.using(model, name)(**call).logits for name in ("eager", "strobe")]


@pytest.mark.parametrize("family", FAMILIES)
def test_logits(family):
    model = models.build(family)
    eager, ours = both(model, input_ids=models.tokens(2, LENGTH))
    torch.testing.assert_close(ours, eager, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_padded_logits(family, side):
    model, mask = models.build(family), models.padding(LENGTH, 9, 0, 4, side=side)
    eager, ours = both(model, input_ids=models.tokens(3, LENGTH), attention_mask=mask)
    real = mask.bool()
    torch.testing.assert_close(ours[real], eager[real], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_logits(family, use_cache):
    """Sequences in one row, told by their positions; also where the model fills a cache, as it does by default."""
    model, ids = models.build(family), models.tokens(2, LENGTH)
    lengths = ([8, 1, 12], [21])
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    ours = both(model, input_ids=ids, position_ids=positions, use_cache=use_cache)[1]
    models.using(model, "eager")
    for row, parts in enumerate(lengths):
        at = 0
        for n in parts:
            with torch.no_grad():
                alone = model(ids[row : row + 1, at : at + n]).logits[0]
            torch.testing.assert_close(ours[row, at : at + n], alone, atol=2e-5, rtol=1e-4)
            at += n


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients(family):
    model, ids = models.build(family), models.tokens(3, LENGTH)
    mask = models.padding(LENGTH, 0, 6, 3, side="left")
    seen = mask.bool() & torch.nn.functional.pad(mask, (1, -1)).bool()  # a first token would be predicted from padding
    labels = ids.masked_fill(~seen, -100)
    gradients = []
    for name in ("eager", "strobe"):
        model.zero_grad()
        models.using(model, name)(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        scale = expected.abs().max().item()
        torch.testing.assert_close(gradients[1][name], expected, atol=1e-6 + 1e-4 * scale, rtol=1e-3, msg=name)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", FAMILIES)
def test_generation(family, cache):
    """Token by token, past the windows, with padding on the left."""
    model, ids = models.build(family), models.tokens(2, 10)
    call = dict(
        attention_mask=models.padding(10, 4, 0, side="left"),
        max_new_tokens=8,
        do_sample=False,
        cache_implementation=cache,
        disable_compile=True,
        return_dict_in_generate=True,
        output_logits=True,
    )
    eager, ours = (models.using(model, name).generate(ids, **call) for name in ("eager", "strobe"))
    assert torch.equal(ours.sequences, eager.sequences)
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(eager.logits), atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("route", ["plain", "padded", "packed"])
def test_dropout(route):
    """Of the probabilities: over many draws the output without dropout, and the same draw from the same seed."""
    model = models.using(models.build("llama", layers=1, attention_dropout=0.3), "strobe")
    call = dict(input_ids=models.tokens(1, 10).repeat(64, 1), use_cache=False)
    if route == "padded":
        call["attention_mask"] = models.padding(10, *[3] * 64, side="left")
    if route == "packed":
        call["position_ids"] = torch.tensor([*range(4), *range(6)]).repeat(64, 1)
    drawn = []
    inner = model.model.layers[0].self_attn.register_forward_hook(lambda module, args, out: drawn.append(out[0][:, 5]))
    with torch.no_grad():
        model(**call)
        for seed in (*range(20), 0):
            torch.manual_seed(seed)
            model.train()(**call)
    inner.remove()
    exact, *many, again = drawn
    many = torch.stack(many)
    assert torch.equal(many[0], again)
    deviation = many.std((0, 1))
    assert deviation.max() > 0.05
    assert ((many.mean((0, 1)) - exact[0]).abs() < 6 * deviation / (20 * 64) ** 0.5 + 1e-6).all()


def test_half_precision():
    model = models.build("qwen3").bfloat16()
    eager, ours = both(model, input_ids=models.tokens(2, LENGTH))
    exact = models.using(model.float(), "eager")(input_ids=models.tokens(1, LENGTH)).logits
    assert ours.dtype == torch.bfloat16 and exact.dtype == torch.float32
    torch.testing.assert_close(ours, eager, atol=0.1, rtol=0.05)


def test_gradient_checkpointing():
    model, ids = models.build("llama").train(), models.tokens(2, LENGTH)
    mask = models.padding(LENGTH, 5, 0, side="left")
    gradients = []
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            model.gradient_checkpointing_enable()
        models.using(model, "strobe")(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_v_is_not_padded_to_the_head_dim_of_k(monkeypatch):
    import strobe.hf.attention as route

    seen = []
    real = route.flash_attn_func

    def watched(q, k, v, **options):
        seen.append((q.shape[-1], v.shape[-1]))
        return real(q, k, v, **options)

    monkeypatch.setattr(route, "flash_attn_func", watched)
    both(models.build("deepseek"), input_ids=models.tokens(1, 5))
    assert seen == [(20, 10)] * 4
