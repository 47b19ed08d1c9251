"""SWAA's recipe: a window per layer, kept tokens, full attention while decoding, and training for it."""

import json

import pytest
import small_models as models
import torch
from eager_reference import Expected, run

import strobe.hf

WINDOW, KEEP = 5, 2
LAYERS = [(WINDOW, KEEP, True), (None, 0, False), (WINDOW, KEEP, True), (None, 0, False)]
RECIPE = dict(window=WINDOW, keep_first=KEEP, force_fa_decode=True, full_layers=[1, 3])


def close(ours, expected):
    torch.testing.assert_close(ours, expected, atol=3e-5, rtol=1e-4)


def padding(side, length=20):
    return torch.ones(3, length).long() if side is None else models.padding(length, 7, 0, 3, side=side)


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "deepseek"])
def test_prefill_has_the_window(family, side):
    model, mask, ids = models.build(family), padding(side), models.tokens(3, 20)
    strobe.hf.apply(model, **RECIPE)
    with torch.no_grad():
        ours = model(ids, attention_mask=mask).logits
        expected = run(model, Expected(LAYERS, mask), input_ids=ids, attention_mask=mask).logits
        full = models.using(model, "eager")(ids, attention_mask=mask).logits
    real = mask.bool()
    close(ours[real], expected[real])
    assert (ours[real] - full[real]).abs().max() > 0.01  # the window is seen


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("side", [None, "left"])
def test_generation_decodes_with_full_attention(side, cache):
    model, mask, ids = models.build("llama"), padding(side), models.tokens(3, 20)
    strobe.hf.apply(model, **RECIPE)
    made = model.generate(
        ids, attention_mask=mask, max_new_tokens=6, do_sample=False, cache_implementation=cache, disable_compile=True,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    whole = torch.nn.functional.pad(mask, (0, 5), value=1)
    place = (whole.cumsum(1) - 1).clamp(min=0)
    expected = Expected(LAYERS, whole, torch.full((3,), 20))
    with torch.no_grad():
        logits = run(model, expected, input_ids=made.sequences[:, :-1], attention_mask=whole, position_ids=place).logits
    close(torch.stack(made.logits, 1), logits[:, 19:])


@pytest.mark.parametrize("decode", [True, False, [0]])
def test_decoding_after_a_prompt_padded_on_the_right(decode):
    """The cache keeps the padding between the prompt and the answer."""
    model, mask, ids = models.build("llama"), padding("right"), models.tokens(3, 20)
    strobe.hf.apply(model, **RECIPE | dict(force_fa_decode=decode))
    places = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        out = model(ids, attention_mask=mask, position_ids=places, use_cache=True)
        row = out.logits[torch.arange(3), mask.sum(1) - 1]
        ours = [row]
        for _ in range(4):
            token = row.argmax(-1, keepdim=True)
            ids, mask = torch.cat([ids, token], 1), torch.nn.functional.pad(mask, (0, 1), value=1)
            places = (mask.cumsum(1) - 1)[:, -1:]
            out = model(token, attention_mask=mask, position_ids=places, past_key_values=out.past_key_values)
            row = out.logits[:, 0]
            ours.append(row)
        full_rows = [decode is True or (decode is not False and layer in decode) for layer in range(4)]
        layers = [(w, k, full) for (w, k, _), full in zip(LAYERS, full_rows, strict=True)]
        for b in range(3):  # alone, and without its padding
            real = mask[b].bool()
            one, n = ids[b][real][None], int(real.sum())
            expected = Expected(layers, torch.ones(1, n), torch.tensor([n - 4]))
            logits = run(model, expected, input_ids=one).logits[0]
            close(torch.stack([row[b] for row in ours]), logits[n - 5 :])


@pytest.mark.parametrize("family", ["llama", "deepseek"])
@pytest.mark.parametrize("side", [None, "left", "right"])
def test_training_with_full_attention_on_the_answer(family, side):
    """One call, any batch: what the original does one row at a time with two calls."""
    model, mask, ids = models.build(family), padding(side), models.tokens(3, 20)
    strobe.hf.apply(model, **RECIPE)
    answer = torch.tensor([11, 9, 13])
    column = torch.arange(20)
    labels = ids.masked_fill((column < answer[:, None]) | (mask == 0), -100)
    assert torch.equal(strobe.hf.answer_start(labels), answer)
    gradients = []
    for route in ("ours", "expected"):
        model.zero_grad()
        call = dict(input_ids=ids, attention_mask=mask, labels=labels)
        if route == "ours":
            loss = model(**call, full_from=strobe.hf.answer_start(labels)).loss
        else:
            loss = run(model, Expected(LAYERS, mask, answer), **call).loss
        loss.backward()
        gradients.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-6 + 1e-4 * expected.abs().max().item(), rtol=1e-3)


def test_packed_training_with_full_attention_on_the_answers():
    model, ids = models.build("llama"), models.tokens(1, 20)
    strobe.hf.apply(model, **RECIPE)
    positions = torch.cat([torch.arange(12), torch.arange(8)])[None]
    full_from = torch.tensor([9, 4], dtype=torch.int32)
    with torch.no_grad():
        ours = model(ids, position_ids=positions, full_from=full_from, use_cache=False).logits[0]
        for at, n, answer in ((0, 12, 9), (12, 8, 4)):
            expected = Expected(LAYERS, torch.ones(1, n), torch.tensor([answer]))
            close(ours[at : at + n], run(model, expected, input_ids=ids[:, at : at + n]).logits[0])


def test_a_model_that_decodes_draws_the_same_as_it_was_trained():
    """full_from = length of the prompt makes a forward of the whole text equal to prefill and decoding."""
    model, ids = models.build("llama"), models.tokens(2, 15)
    strobe.hf.apply(model, **RECIPE)
    made = model.generate(ids, max_new_tokens=6, do_sample=False, return_dict_in_generate=True, output_logits=True)
    with torch.no_grad():
        close(model(made.sequences, full_from=15).logits[:, 14:-1], torch.stack(made.logits, 1))


def test_assisted_decoding_draws_the_same():
    model, assistant, ids = models.build("llama"), models.build("llama", layers=1), models.tokens(1, 15)
    strobe.hf.apply(model, **RECIPE)
    models.using(assistant, "strobe")
    plain = model.generate(ids, max_new_tokens=12, do_sample=False)
    helped = model.generate(ids, max_new_tokens=12, do_sample=False, assistant_model=assistant, full_from=15)
    assert torch.equal(plain, helped)


def test_several_queries_beside_a_cache_warn(caplog, monkeypatch):
    import strobe.hf.attention as route

    said = []
    monkeypatch.setattr(route.logger, "warning_once", said.append)
    model, ids = models.build("llama"), models.tokens(1, 12)
    strobe.hf.apply(model, **RECIPE)
    with torch.no_grad():
        model.generate(ids, max_new_tokens=2, do_sample=False, cache_implementation="static", disable_compile=True)
        cache = model(ids[:, :8], use_cache=True).past_key_values
        assert not said
        model(ids[:, 8:], past_key_values=cache)
    assert "full_from" in said[0]


def test_windows_by_list_and_by_layer_type():
    model, ids = models.build("llama"), models.tokens(2, 16)
    strobe.hf.apply(model, window=[3, None, 7, 2], keep_first=[1, 0, 4, 0])
    layers = [(3, 1, False), (None, 0, False), (7, 4, False), (2, 0, False)]
    with torch.no_grad():
        expected = run(model, Expected(layers, torch.ones(2, 16)), input_ids=ids).logits
        close(model(ids).logits, expected)
    model = models.build("gemma3")
    strobe.hf.apply(model, window={"full_attention": 4}, keep_first=1)
    layers = [(6, 0, False), (4, 1, False)] * 2
    with torch.no_grad():
        expected = run(model, Expected(layers, torch.ones(2, 16)), input_ids=ids).logits
        close(model(ids).logits, expected)


def test_the_settings_are_saved_with_the_config(tmp_path):
    model, ids = models.build("llama"), models.tokens(2, 16)
    strobe.hf.apply(model, **RECIPE)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["strobe"] == RECIPE
    again = type(model).from_pretrained(tmp_path, attn_implementation="strobe").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits, atol=0, rtol=0)


def test_the_config_alone_is_enough():
    model, ids = models.build("llama"), models.tokens(2, 16)
    models.using(model, "strobe")
    model.config.strobe = RECIPE
    with torch.no_grad():
        close(model(ids).logits, run(model, Expected(LAYERS, torch.ones(2, 16)), input_ids=ids).logits)


def test_the_names_of_swaaconfig():
    model = models.build("llama")
    strobe.hf.apply(model, sliding_window_size=5, keep_first=2, force_fa_decode=[0], non_sliding_layers=[1, 3])
    assert model.config.strobe == dict(window=5, keep_first=2, force_fa_decode=[0], full_layers=[1, 3])


@pytest.mark.parametrize(
    "settings, error, says",
    [
        (dict(windows=5), TypeError, "no setting 'windows'"),
        (dict(window=5, sliding_window_size=5), TypeError, "names of one setting"),
        (dict(window=0), ValueError, "at least 1"),
        (dict(window=5, keep_first=-1), ValueError, "at least 0"),
        (dict(window=5.5), ValueError, "integers"),
        (dict(window=[5, 5]), ValueError, "lists 2 layers, the model has 4"),
        (dict(window={"sliding": 5}), ValueError, "layer types"),
        (dict(window=5, full_layers=[4]), ValueError, r"names layers \[4\]"),
        (dict(window=5, full_layers=[0, 1, 2, 3]), ValueError, "no layer has a window"),
        (dict(window=5, force_fa_decode=3), ValueError, "list of layer numbers"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, error, says):
    model = models.build("llama")
    with pytest.raises(error, match=says):
        strobe.hf.apply(model, **settings)
    assert getattr(model.config, "strobe", None) is None


def test_a_model_that_slides_by_itself_is_refused():
    with pytest.raises(ValueError, match="slide by themselves"):
        strobe.hf.apply(models.build("mistral"), window=4)


def test_full_from_of_another_batch_is_refused():
    model = models.build("llama")
    strobe.hf.apply(model, **RECIPE)
    with pytest.raises(ValueError, match="full_from has shape"):
        model(models.tokens(2, 8), full_from=torch.tensor([1, 2, 3]))
