"""torch.compile of whole forwards, without a break in the graph."""

import pytest
import small_models as models
import torch
from transformers import CompileConfig

import strobe.hf

LENGTH = 14


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


def compiled(model):
    return torch.compile(model.forward, backend="aot_eager", fullgraph=True)


CALLS = {
    "plain": {},
    "padded": dict(attention_mask=models.padding(LENGTH, 5, 0, side="left")),
    "packed": dict(position_ids=torch.tensor([[*range(8), *range(6)], [*range(3), *range(11)]])),
}


@pytest.mark.parametrize("call", CALLS)
def test_forward(call):
    model, ids = models.using(models.build("gemma3", layers=2), "strobe"), models.tokens(2, LENGTH)
    call = CALLS[call] | dict(use_cache=False)
    with torch.no_grad():
        expected, ours = model(ids, **call).logits, compiled(model)(ids, **call).logits
    real = call.get("attention_mask", torch.ones(2, LENGTH)).bool()
    torch.testing.assert_close(ours[real], expected[real], atol=1e-6, rtol=1e-5)


def test_training_with_a_window_and_full_rows():
    model, ids = models.build("llama", layers=2), models.tokens(2, LENGTH)
    strobe.hf.apply(model, window=4, keep_first=1, force_fa_decode=True, full_layers=[0])
    call = CALLS["padded"] | dict(use_cache=False, labels=ids, full_from=torch.tensor([9, 6]))
    gradients = []
    for forward in (model, compiled(model)):
        model.zero_grad()
        forward(ids, **call).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-4)


def test_padding_between_tokens_stops_a_compiled_forward():
    model = models.using(models.build("llama", layers=1), "strobe")
    with torch.no_grad(), pytest.raises(RuntimeError, match="padding between tokens"):
        compiled(model)(models.tokens(1, 6), attention_mask=torch.tensor([[1, 1, 0, 0, 1, 1]]), use_cache=False)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_generation_with_a_static_cache(family):
    model, ids = models.using(models.build(family, layers=2), "strobe"), models.tokens(2, 9)
    call = dict(attention_mask=models.padding(9, 4, 0, side="left"), max_new_tokens=6, do_sample=False)
    expected = model.generate(ids, **call)
    how = CompileConfig(backend="aot_eager", fullgraph=True, mode=None)
    how._compile_all_devices = True
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert torch.equal(model.generate(ids, **call, cache_implementation="static", compile_config=how), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > graphs
