"""Small random models, made from the config classes of Transformers."""

import torch
import transformers

VOCABULARY = 96
_COMMON = dict(
    vocab_size=VOCABULARY,
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=None,
)
_SLIDING_FIRST = ["sliding_attention", "full_attention"] * 2

CONFIGS = {
    "llama": ("Llama", {}),
    "qwen3": ("Qwen3", dict(head_dim=12)),
    "qwen3_sliding": ("Qwen3", dict(head_dim=12, use_sliding_window=True, sliding_window=6, max_window_layers=2)),
    "mistral": ("Mistral", dict(sliding_window=7)),
    "gemma2": ("Gemma2", dict(head_dim=12, sliding_window=6, attn_logit_softcapping=5.0, layer_types=_SLIDING_FIRST)),
    "gemma3": ("Gemma3", dict(head_dim=12, sliding_window=6, layer_types=_SLIDING_FIRST)),
    "gpt_oss": (
        "GptOss",
        dict(head_dim=12, sliding_window=6, num_local_experts=2, num_experts_per_tok=1, layer_types=_SLIDING_FIRST),
    ),
    # q and k of 12 + 8 = 20, v of 10.
    "deepseek": (
        "DeepseekV3",
        dict(
            num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=12, qk_rope_head_dim=8,
            v_head_dim=10, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, n_shared_experts=1,
            moe_intermediate_size=32, first_k_dense_replace=2,
        ),
    ),  # fmt: skip
}  # fmt: skip


def build(name: str, layers: int | None = None, **changes):
    family, own = CONFIGS[name]
    values = _COMMON | own | changes
    if layers is not None:
        values["num_hidden_layers"] = layers
        values |= {"layer_types": values["layer_types"][:layers]} if "layer_types" in values else {}
    config_class = "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config"
    model = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, config_class)(**values))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim > 1:  # scores that vary: initializations are so small that all keys weigh the same
                parameter.normal_(std=0.5 * parameter.shape[-1] ** -0.5 * (3 if "q_" in parameter_name else 1))
            elif parameter_name.endswith("sinks"):
                parameter.normal_()
    return model.eval()


def tokens(batch: int, length: int):
    return torch.randint(1, VOCABULARY, (batch, length))


def padding(length: int, *pads: int, side: str):
    """A 2-D mask: row b has pads[b] columns of padding."""
    columns = torch.arange(length)
    if side == "left":
        return torch.stack([columns >= pad for pad in pads]).long()
    return torch.stack([columns < length - pad for pad in pads]).long()


def using(model, implementation: str):
    model.set_attn_implementation(implementation)
    return model
