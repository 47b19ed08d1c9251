"""What was asked of Strobe for a model in vLLM, per layer: `additional_config["strobe"]`, or the model's config."""

from types import SimpleNamespace

from strobe._settings import NOTHING, Layer, normalized, of_config

__all__ = ["NOTHING", "Layer", "layer_number", "of_engine"]


def of_engine(vllm_config) -> list[Layer] | None:
    """The settings of each layer; None where there are none. The names and their meaning are those of `strobe.hf`."""
    model_config = getattr(vllm_config, "model_config", None)
    additional = getattr(vllm_config, "additional_config", None)
    config = getattr(model_config, "hf_text_config", None)
    given = additional.get("strobe") if isinstance(additional, dict) else None
    if given is None:
        given = getattr(config, "strobe", None)  # saved by strobe.hf.apply()
    if not given:
        return None
    if not isinstance(given, dict):
        raise TypeError(f'strobe.vllm: additional_config["strobe"] is {given!r}, it takes a dict of settings')
    layers = of_config(
        SimpleNamespace(
            num_hidden_layers=config.num_hidden_layers,
            layer_types=getattr(config, "layer_types", None),
            strobe=normalized(**given),
        )
    )
    if given.get("window", given.get("sliding_window_size")) is not None and not any(one.window for _, one in layers):
        raise ValueError("strobe.vllm: no layer has a window: full_layers names them all")
    return [layer for _, layer in layers]


def layer_number(layer_name: str) -> int:
    """3 of "model.layers.3.self_attn.attn"."""
    numbers = [int(part) for part in layer_name.split(".") if part.isdigit()]
    if len(numbers) != 1:
        raise NotImplementedError(
            f"strobe.vllm: settings per layer, in a model that names an attention layer {layer_name!r}"
        )
    return numbers[0]
