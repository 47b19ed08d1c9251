"""What the mask function says is what Transformers asked for, pair by pair; what it cannot say goes the dense route."""

import pytest
import small_models as models
import torch
import transformers
from transformers import masking_utils as hf

import strobe.hf
from strobe.hf.masks import BIDIRECTIONAL, PACKED, Layout, mask, recognized

BATCH, LENGTH = 3, 12
SEQUENCES = torch.tensor([[0] * 5 + [1] * 7, [0] * 12, [0, 1] + [2] * 10])
PLACES = torch.tensor([[*range(5), *range(7)], [*range(12)], [0, 0, *range(10)]])

PATTERNS = {
    "causal": (hf.causal_mask_function, {}),
    "sliding": (hf.sliding_window_causal_mask_function(4), dict(local_size=4)),
    "bidirectional": (hf.bidirectional_mask_function, dict(allow_is_bidirectional_skip=True)),
    "packed": (hf.and_masks(hf.causal_mask_function, hf.packed_sequence_mask_function(SEQUENCES)), {}),
    "sliding_packed": (
        hf.and_masks(hf.sliding_window_causal_mask_function(4), hf.packed_sequence_mask_function(SEQUENCES)),
        dict(local_size=4),
    ),
}
if hasattr(hf, "packed_sequence_compatibility_function"):
    PATTERNS["sliding_remapped"] = (
        hf.packed_sequence_compatibility_function(hf.sliding_window_causal_mask_function(4), PLACES, SEQUENCES),
        dict(local_size=4),
    )
FOREIGN = {
    "chunked": hf.chunked_causal_mask_function(4, torch.zeros(BATCH, dtype=torch.int64)),
    "bidirectional_sliding": hf.sliding_window_bidirectional_mask_function(3),
    "blocks": hf.or_masks(hf.causal_mask_function, hf.blockwise_overlay(SEQUENCES)),
    "custom": hf.and_masks(hf.causal_mask_function, lambda b, h, q, k: (q - k) % 2 == 0),
    "two_windows": hf.and_masks(hf.sliding_window_overlay(3), hf.sliding_window_overlay(5), hf.causal_mask_function),
    "no_causality": hf.and_masks(hf.sliding_window_overlay(3), hf.packed_sequence_mask_function(SEQUENCES)),
    "mixed": hf.and_masks(hf.causal_mask_function, hf.bidirectional_mask_function),
}
PADDING = {
    "none": None,
    "ones": torch.ones(BATCH, LENGTH).bool(),
    "left": models.padding(LENGTH, 4, 0, 11, side="left").bool(),
    "right": models.padding(LENGTH, 4, 0, 7, side="right").bool(),
    "both": torch.stack([models.padding(LENGTH, n, side="left")[0] for n in (2, 0, 5)]).bool()
    & models.padding(LENGTH, 3, 0, 1, side="right").bool(),
}


def visible(result, rows, columns) -> torch.Tensor:
    """[batch, rows, columns] pairs that the attention function will use, by the definition of Strobe's mask."""
    if result is None:
        result = Layout(1, None, torch.empty(BATCH, 0)).pack()
    if result.dtype == torch.bool:
        return result[:, 0]
    layout = Layout.unpack(result)
    i, j = torch.arange(rows)[:, None], torch.arange(columns)[None, :]
    if layout.kind == PACKED:
        ends = layout.numbers[0]
        sequence = torch.bucketize(torch.arange(BATCH * rows), ends[1:], right=True).view(BATCH, rows)
        seen = (sequence[:, :, None] == sequence[:, None, :]) & (j <= i)
        off = torch.zeros(BATCH, 1, 1)
    else:
        numbers = layout.numbers if layout.numbers.shape[1] else torch.tensor([[0, columns]] * BATCH)
        first, end = numbers[:, 0, None, None], numbers[:, 1, None, None]
        off = end - rows
        seen = (j >= first) & (j < end)
        if layout.kind != BIDIRECTIONAL:
            seen = seen & (j <= i + off)
    if layout.window is not None:
        seen = seen & (j > i + off - layout.window)
    return seen.expand(BATCH, rows, columns)


@pytest.mark.parametrize("padded", PADDING)
@pytest.mark.parametrize("name", PATTERNS)
def test_what_is_visible(name, padded):
    function, more = PATTERNS[name]
    packed = "packed" in name or "remapped" in name  # Transformers packs only what has no padding
    attention_mask = None if packed else PADDING[padded]
    call = dict(batch_size=BATCH, q_length=LENGTH, kv_length=LENGTH, mask_function=function) | more
    call |= dict(attention_mask=attention_mask)
    result = mask(**call | dict(allow_is_causal_skip=not packed))
    assert result is None or result.dtype == torch.int32
    never = dict(allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
    expected = hf.sdpa_mask(**call | never)[:, 0]
    rows = torch.ones(BATCH, LENGTH).bool() if attention_mask is None else attention_mask
    assert torch.equal(visible(result, LENGTH, LENGTH)[rows], expected[rows])
    assert result is None or name != "causal" or padded in ("left", "both")


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("padded", ["none", "ones", "left"])
@pytest.mark.parametrize("name", ["causal", "sliding"])
@pytest.mark.parametrize("rows, before, columns, kv_offset", [(1, 7, 8, 0), (3, 5, 16, 0), (4, 0, 16, 0), (1, 9, 4, 6)])
def test_beside_a_cache(name, padded, as_tensor, rows, before, columns, kv_offset):
    """Dynamic, static (longer than what is in it) and sliding (without its first columns) caches."""
    pads = {"ones": (0, 0, 0), "left": (min(3, before), 0, min(1, before))}.get(padded)
    attention_mask = None if pads is None else models.padding(before + rows, *pads, side="left").bool()
    function, more = PATTERNS[name]
    q_offset = torch.tensor(before) if as_tensor else before
    call = dict(
        batch_size=BATCH, q_length=rows, kv_length=columns, q_offset=q_offset, kv_offset=kv_offset,
        mask_function=function, attention_mask=attention_mask,
    ) | more  # fmt: skip
    result = mask(**call)
    assert result is None or result.dtype == torch.int32
    expected = hf.sdpa_mask(**call | dict(allow_is_causal_skip=False))[:, 0]
    assert torch.equal(visible(result, rows, columns), expected.expand(BATCH, -1, -1))


@pytest.mark.parametrize("name", FOREIGN)
def test_other_patterns_go_the_dense_route(name):
    assert recognized(FOREIGN[name]) is None
    call = dict(batch_size=BATCH, q_length=LENGTH, kv_length=LENGTH, mask_function=FOREIGN[name])
    result = mask(**call)
    assert result.dtype == torch.bool
    assert torch.equal(result, hf.sdpa_mask(**call, allow_is_causal_skip=False))


def test_padding_between_tokens_goes_the_dense_route():
    holes = torch.tensor([[1, 1, 0, 0, 1, 1]]).bool()
    call = dict(batch_size=1, q_length=6, kv_length=6, attention_mask=holes)
    assert torch.equal(mask(**call), hf.sdpa_mask(**call, allow_is_causal_skip=False))


def test_a_custom_overlay_of_the_user_goes_the_dense_route():
    model = models.using(models.build("llama"), "strobe")
    embeds = torch.zeros(2, 6, 48)
    made = hf.create_causal_mask(model.config, embeds, None, None, or_mask_function=lambda b, h, q, k: k == 3)
    assert made.dtype == torch.bool and made[:, :, 0, 3].all()


def test_a_mask_of_four_dimensions():
    model, ids = models.build("qwen3"), models.tokens(2, 9)
    seen = torch.ones(9, 9).tril().bool() & (torch.rand(2, 1, 9, 9) > 0.3) | torch.eye(9).bool()
    added = torch.zeros(2, 1, 9, 9).masked_fill(~seen, torch.finfo(torch.float32).min)
    with torch.no_grad():
        eager = models.using(model, "eager")(ids, attention_mask=added).logits
        models.using(model, "strobe")
        torch.testing.assert_close(model(ids, attention_mask=added).logits, eager, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(model(ids, attention_mask=seen).logits, eager, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_a_mask_of_four_dimensions_with_softcap_and_sinks(family):
    model, ids = models.build(family), models.tokens(2, 9)
    seen = torch.ones(2, 1, 9, 9).tril().bool() & (torch.rand(2, 1, 9, 9) > 0.3) | torch.eye(9).bool()
    added = torch.zeros(2, 1, 9, 9).masked_fill(~seen, torch.finfo(torch.float32).min)
    with torch.no_grad():
        eager = models.using(model, "eager")(ids, attention_mask=added).logits
        ours = models.using(model, "strobe")(ids, attention_mask=seen).logits
        torch.testing.assert_close(ours, eager, atol=2e-5, rtol=1e-4)


def test_a_mask_of_four_dimensions_of_integers_is_refused():
    model = models.using(models.build("llama"), "strobe")
    for dtype in (torch.int64, torch.int32):
        with pytest.raises(TypeError, match="4-D attention mask"):
            model(models.tokens(2, 9), attention_mask=torch.ones(2, 1, 9, 9, dtype=dtype))


def test_a_window_beside_a_mask_of_four_dimensions_is_refused():
    model = models.build("llama")
    strobe.hf.apply(model, window=4, full_layers=[0, 1])
    with pytest.raises(NotImplementedError, match=r"4-D mask.*layer 2"):
        model(models.tokens(2, 9), attention_mask=torch.ones(2, 1, 9, 9).bool())


def test_a_window_beside_padding_between_the_tokens_of_a_prompt_is_refused():
    model = models.build("llama")
    strobe.hf.apply(model, window=4)
    with pytest.raises(NotImplementedError, match="padding between the tokens"):
        model(models.tokens(1, 6), attention_mask=torch.tensor([[1, 1, 0, 0, 1, 1]]))


def test_chunked_attention():
    config = transformers.Llama4TextConfig(
        vocab_size=models.VOCABULARY, hidden_size=48, intermediate_size=64, intermediate_size_mlp=64, head_dim=12,
        num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1,
        attention_chunk_size=6, pad_token_id=0, no_rope_layers=[1, 1, 1, 0],
    )  # fmt: skip
    model, ids = transformers.Llama4ForCausalLM(config).eval(), models.tokens(2, 20)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.normal_(std=0.15)
        eager, ours = (models.using(model, name)(ids, use_cache=False).logits for name in ("eager", "strobe"))
    torch.testing.assert_close(ours, eager, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["Bert", "ModernBert"])
def test_encoders(family, side):
    config = getattr(transformers, f"{family}Config")(
        vocab_size=models.VOCABULARY, hidden_size=48, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=64, pad_token_id=0, **({"local_attention": 8} if family == "ModernBert" else {}),
    )  # fmt: skip
    model, attention_mask = getattr(transformers, f"{family}Model")(config).eval(), models.padding(20, 6, 0, side=side)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim > 1 and "embeddings" not in name:
                p.normal_(std=0.2)
        call = dict(input_ids=models.tokens(2, 20), attention_mask=attention_mask)
        eager, ours = (models.using(model, name)(**call).last_hidden_state for name in ("eager", "strobe"))
    real = attention_mask.bool()
    torch.testing.assert_close(ours[real], eager[real], atol=3e-5, rtol=1e-4)


def test_an_encoder_with_a_decoder():
    config = transformers.BartConfig(
        vocab_size=models.VOCABULARY, d_model=48, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    model = transformers.BartModel(config).eval()
    call = dict(input_ids=models.tokens(2, 11), attention_mask=models.padding(11, 4, 0, side="right"))
    call |= dict(decoder_input_ids=models.tokens(2, 7))
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.normal_(std=0.2)
        eager, ours = (models.using(model, name)(**call).last_hidden_state for name in ("eager", "strobe"))
    torch.testing.assert_close(ours, eager, atol=3e-5, rtol=1e-4)


def test_a_position_bias_is_refused():
    config = transformers.T5Config(vocab_size=96, d_model=48, d_kv=12, d_ff=64, num_layers=1, num_heads=4)
    model = models.using(transformers.T5EncoderModel(config), "strobe")
    with pytest.raises(NotImplementedError, match="position_bias"):
        model(models.tokens(1, 5))


def test_a_mask_that_the_model_wants_to_compute_with():
    """As sparse indexers do; a compiled decoding step, which asks for it too, computes nothing with it."""
    call = dict(batch_size=2, kv_length=6, allow_is_causal_skip=False)
    assert torch.equal(mask(**call, q_length=6), hf.sdpa_mask(**call, q_length=6))
    assert mask(**call, q_length=1, q_offset=5) is None
    call["config"] = transformers.DeepseekV32Config()  # it cannot do with less
    assert torch.equal(mask(**call, q_length=1, q_offset=5), hf.sdpa_mask(**call, q_length=1, q_offset=5))


def test_a_sparse_indexer_is_refused():
    config = transformers.DeepseekV32Config(
        vocab_size=models.VOCABULARY, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=12, qk_rope_head_dim=8, v_head_dim=10,
        n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, moe_intermediate_size=32, index_topk=5,
        index_head_dim=16, index_n_heads=2, first_k_dense_replace=2, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    model = models.using(transformers.DeepseekV32ForCausalLM(config), "strobe")
    with pytest.raises(NotImplementedError, match="indices; load DeepseekV32Attention's model with sdpa"):
        model(models.tokens(2, 15))


def test_positions_that_jump_are_one_sequence():
    model, ids = models.build("llama"), models.tokens(1, 12)
    positions = torch.cat([torch.arange(5), torch.arange(9, 16)])[None]
    call = dict(input_ids=ids, position_ids=positions, use_cache=True)
    with torch.no_grad():
        eager, ours = (models.using(model, name)(**call).logits for name in ("eager", "strobe"))
    torch.testing.assert_close(ours, eager, atol=2e-5, rtol=1e-4)


def test_positions_that_are_overwritten():
    """What was found in a tensor of positions is forgotten when it is written to."""
    model, ids = models.using(models.build("llama"), "strobe"), models.tokens(1, 12)
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    with torch.no_grad():
        packed = model(ids, position_ids=positions).logits
        positions.copy_(torch.arange(12)[None])
        plain = model(ids, position_ids=positions).logits
        assert torch.equal(plain, model(ids).logits) and not torch.equal(plain, packed)
