"""Continuous batching: what it draws is what generate() draws."""

import pytest
import small_models as models
import torch
import transformers
from transformers import ContinuousBatchingConfig, GenerationConfig

import strobe
import strobe.hf
from strobe._settings import Layer
from strobe.hf.paged import paged_attention

PREFIXED = tuple(int(n) for n in transformers.__version__.split(".")[:2]) < (5, 19)
NAME = "paged|strobe" if PREFIXED else "strobe_flash_3"


@pytest.fixture(autouse=True, scope="module")
def _patched():
    strobe.hf.register(patch=True)


def drawn(model, prompts, name=NAME):
    settings = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
    alone = [
        models.using(model, "strobe").generate(torch.tensor([p]), generation_config=settings)[0, len(p) :].tolist()
        for p in prompts
    ]
    batching = ContinuousBatchingConfig(num_blocks=32, block_size=4, max_batch_tokens=64)
    made = models.using(model, name).generate_batch(
        inputs=prompts, generation_config=settings, continuous_batching_config=batching
    )
    by_prompt = {tuple(out.prompt_ids): out.generated_tokens for out in made.values()}
    return alone, [by_prompt[tuple(p)] for p in prompts]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_generate_batch(family):
    if family == "gpt_oss" and not PREFIXED:
        family = "qwen3"  # gpt-oss lists the flash implementations that it takes, by name
    prompts = [models.tokens(1, n)[0].tolist() for n in (5, 13, 21)]
    alone, together = drawn(models.build(family), prompts)
    assert together == alone


def test_generate_batch_with_a_window_in_the_prompt_and_full_attention_after_it():
    model = models.build("llama")
    prompts = [models.tokens(1, n)[0].tolist() for n in (5, 13, 21)]
    full = drawn(model, prompts)[0]
    strobe.hf.apply(model, window=4, keep_first=1, force_fa_decode=True, full_layers=[1])
    alone, together = drawn(model, prompts)
    assert together == alone and alone != full


def test_the_flash_name_outside_of_continuous_batching():
    model, ids = models.build("qwen3"), models.tokens(2, 9)
    mask = models.padding(9, 3, 0, side="left")
    with torch.no_grad():
        logits = [models.using(model, n)(ids, attention_mask=mask).logits for n in ("strobe", "strobe_flash_3")]
    assert torch.equal(*logits)


class _Blocks:
    """The part of Transformers' paged cache that decoding over block tables reads, in both of its forms."""

    def __init__(self, heads, dim, blocks, size):
        self.block_size, self.num_key_value_heads, self.head_dim = size, heads, dim
        self.key_cache = [torch.randn(blocks * size, heads, dim)]
        self.value_cache = [torch.randn(blocks * size, heads, dim)]
        self.layer_index_to_group_indices = {0: (0, 0)}

    def update(self, key_states, value_states, layer_idx, read_index, write_index):
        raise AssertionError("a block table needs no update")


class _NewBlocks(_Blocks):
    def update(self, key_states, value_states, layer_idx, kwargs):
        kwargs["block_table"] = kwargs["block_table"][0]
        shape = (-1, self.block_size, self.num_key_value_heads, self.head_dim)
        kwargs["k_cache"], kwargs["v_cache"] = (c[0].view(shape) for c in (self.key_cache, self.value_cache))
        kwargs["cu_seq_lens_k"] = kwargs["cu_seq_lens_k"]["full_attention"]
        return key_states, value_states


@pytest.mark.parametrize("kind", [_Blocks, _NewBlocks])
def test_decoding_over_block_tables(kind):
    heads, dim, size, lengths = 2, 12, 4, [7, 3]
    cache = kind(heads, dim, 8, size)
    table = torch.tensor([[3, 5, -1], [6, -1, -1]], dtype=torch.int32)
    query, key, value = torch.randn(1, 4, 2, dim), torch.randn(1, heads, 2, dim), torch.randn(1, heads, 2, dim)
    ends = torch.tensor([0, *(n + 1 for n in lengths)]).cumsum(0)
    module = torch.nn.Module()
    module.layer_idx = 0
    kwargs = dict(block_table=table[None], cu_seq_lens_k=ends, max_length_q=1, max_length_k=8, cu_seq_lens_q=None)
    if kind is _NewBlocks:
        kwargs["cu_seq_lens_k"] = {"full_attention": ends}
    before = [c[0].view(-1, size, heads, dim).clone() for c in (cache.key_cache, cache.value_cache)]
    call = dict(softmax_scale=None, softcap=0.0)
    out = paged_attention(module, query, key, value, cache, None, Layer(3, 1, False), None, call, kwargs)
    assert out.shape == (1, 2, 4, dim)
    for b, n in enumerate(lengths):
        k, v = (
            torch.cat([pages[table[b, : -(-n // size)].long()].flatten(0, 1)[:n], new[0, :, b][None]])[None]
            for pages, new in zip(before, (key, value), strict=True)
        )
        q = query[:, :, b][:, None]
        expected = strobe.flash_attn_func(q, k, v, causal=True, window_size=(2, 0), keep_first=1)
        torch.testing.assert_close(out[:, b : b + 1], expected)
        page, row = table[b, n // size], n % size
        torch.testing.assert_close(cache.key_cache[0].view(-1, size, heads, dim)[page, row], key[0, :, b])
