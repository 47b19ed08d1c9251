"""Strobe in Hugging Face Transformers: `register()`, then attn_implementation="strobe"; SWAA's recipe by `apply()`."""

import functools

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations import hub_kernels
from transformers.utils.generic import TransformersKwargs

import strobe
from strobe._settings import normalized, of_config
from strobe.hf import attention as _attention
from strobe.hf import masks as _masks

__all__ = ["answer_start", "apply", "register"]


def register(patch: bool = False) -> None:
    """Makes "strobe", and "paged|strobe" for continuous batching, names of attn_implementation.

    Args:
        patch: also make "strobe_flash_3" one: the same functions under a name that Transformers takes for a flash
            attention. Its continuous batching asks for such a name from 5.19 on, and decodes over block tables only
            then. The only function of Transformers that is replaced is the one that would look for it on the hub.
    """
    for name in ("strobe", "strobe_flash_3") if patch else ("strobe",):
        AttentionInterface.register(name, _attention.attention)
        AttentionMaskInterface.register(name, _masks.mask)
        # Continuous batching masks by the lengths of its sequences: no mask function.
        AttentionInterface.register(f"paged|{name}", _attention.attention)
    # generate() lets no keyword through that it does not know.
    TransformersKwargs.__optional_keys__ = frozenset(TransformersKwargs.__optional_keys__) | {"full_from"}
    if patch and not hasattr(hub_kernels.load_and_register_attn_kernel, "strobe"):
        hub_kernels.load_and_register_attn_kernel = _loader(hub_kernels.load_and_register_attn_kernel)


def _loader(of_the_hub):
    @functools.wraps(of_the_hub)
    def load(attn_implementation, *args, **kwargs):
        if attn_implementation.removeprefix("paged|") == "strobe_flash_3":
            return strobe
        return of_the_hub(attn_implementation, *args, **kwargs)

    load.strobe = True
    return load


def apply(model, **settings):
    """Gives the layers of a model a sliding window, kept tokens and full attention while decoding; returns the model.

    The settings are kept in `model.config.strobe` (of the text config), are saved with it and can be changed there.
    Layers that Transformers itself lets slide stay as they are. Calls `register()`, and switches the model to "strobe".
    For training, and for generate() with an assistant, say from which column on decoding begins:
    `model(..., full_from=answer_start(labels))`, `model.generate(..., full_from=prompt_length)`.

    Args:
        model: a PreTrainedModel.
        window (or sliding_window_size): keys that a query sees, its own included. An int; a list with one entry per
            layer; or a dict by layer type; None for full attention.
        keep_first: the first tokens, not counting padding, that stay visible. Like window.
        force_fa_decode: full attention where a sequence has one query; True, or a list of layers.
        full_layers (or non_sliding_layers): layers without any of this.
    """
    register()
    config = model.config.get_text_config()
    before, config.strobe = getattr(config, "strobe", None), normalized(**settings)
    try:
        layers = of_config(config)
        if not any(layer.window for _, layer in layers) and config.strobe.get("window") is not None:
            raise ValueError("strobe.hf: no layer has a window: full_layers names them all")
        windowed = [i for i, (_, layer) in enumerate(layers) if layer.window]
        if windowed and all(_slides(config, layers[i][0]) for i in windowed):
            raise ValueError(
                f"strobe.hf: layers {windowed} slide by themselves (sliding_window={config.sliding_window}), and their "
                "cache drops what is left of it; load the model with layer_types or sliding_window of full attention"
            )
    except ValueError:
        config.strobe = before
        raise
    if "strobe" not in (model.config._attn_implementation or ""):
        model.set_attn_implementation("strobe")
    return model


def _slides(config, layer_type) -> bool:
    if layer_type is None:
        return getattr(config, "sliding_window", None) is not None
    return layer_type == "sliding_attention"


def answer_start(labels: torch.Tensor, ignore_index: int = -100) -> torch.Tensor:
    """For `full_from`: the column of each row's first label, so that the answer is trained with full attention.

    A row without labels gives its length: the window everywhere.
    """
    known = labels != ignore_index
    return torch.where(known.any(-1), known.int().argmax(-1), labels.shape[-1])
