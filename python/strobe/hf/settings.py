"""Which settings of `config.strobe` an attention module of Transformers has."""

from strobe._settings import NOTHING, Layer, layer_of


def of_module(module) -> Layer:
    config = getattr(module, "config", None)
    settings = getattr(config, "strobe", None)
    if not settings:
        return NOTHING
    layer_idx = getattr(module, "layer_idx", None)
    if layer_idx is None:
        raise NotImplementedError(f"strobe.hf: {type(module).__name__} has no layer_idx, its settings are unknown")
    types = getattr(config, "layer_types", None)
    return layer_of(settings, layer_idx, types[layer_idx] if types else None)
