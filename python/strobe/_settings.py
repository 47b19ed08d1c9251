"""A window, kept tokens and full attention while decoding, per layer, as a dict that JSON can hold: `config.strobe`."""

from typing import NamedTuple

# SWAAConfig's names of the same settings.
_OTHER_NAMES = {"sliding_window_size": "window", "non_sliding_layers": "full_layers"}
_NAMES = ("window", "keep_first", "force_fa_decode", "full_layers")


class Layer(NamedTuple):
    """What one layer does. `window` is counted as Transformers counts it: keys seen, the query's own included."""

    window: int | None = None
    keep_first: int = 0
    force_fa_decode: bool = False


NOTHING = Layer()


def normalized(**given) -> dict:
    """The dict that goes into the config; raises for a name or value that means nothing."""
    settings = {}
    for name, value in given.items():
        known = _OTHER_NAMES.get(name, name)
        if known not in _NAMES:
            raise TypeError(f"strobe: no setting {name!r}; there are {', '.join((*_NAMES, *_OTHER_NAMES))}")
        if known in settings:
            raise TypeError(f"strobe: {name} and {known} are names of one setting, give only one of them")
        settings[known] = list(value) if isinstance(value, (tuple, range, set)) else value
    window, keep_first = settings.get("window"), settings.get("keep_first", 0)
    for name, value, least in (("window", window, 1), ("keep_first", keep_first, 0)):
        for one in _values(value):
            if one is not None and (isinstance(one, bool) or not isinstance(one, int) or one < least):
                raise ValueError(f"strobe: {name} is {value!r}; it takes integers of at least {least}")
    for name in ("force_fa_decode", "full_layers"):
        value = settings.get(name, [])
        if isinstance(value, bool) and name == "force_fa_decode":
            continue
        if not isinstance(value, list) or any(isinstance(i, bool) or not isinstance(i, int) for i in value):
            raise ValueError(f"strobe: {name} is {value!r}; it takes a list of layer numbers")
    return settings


def _values(value):
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else (value,)


def _chosen(value, layer_idx: int, layer_type: str | None, otherwise):
    """The entry of one layer: an int holds for all, a list is by layer number, a dict by layer type."""
    if isinstance(value, dict):
        value = value.get(layer_type)
    elif isinstance(value, list):
        value = value[layer_idx]
    return otherwise if value is None else value


def layer_of(settings: dict, layer_idx: int, layer_type: str | None = None) -> Layer:
    if layer_idx in settings.get("full_layers", ()):
        return NOTHING
    window = _chosen(settings.get("window"), layer_idx, layer_type, None)
    if window is None:
        return NOTHING
    decode = settings.get("force_fa_decode", False)
    return Layer(
        window,
        _chosen(settings.get("keep_first", 0), layer_idx, layer_type, 0),
        layer_idx in decode if isinstance(decode, list) else bool(decode),
    )


def of_config(config) -> list[tuple[str | None, Layer]]:
    """(layer type, settings) of every layer; raises where the settings do not fit the model."""
    count = config.num_hidden_layers
    types = getattr(config, "layer_types", None) or [None] * count
    settings = config.strobe
    for name in ("window", "keep_first"):
        value = settings.get(name)
        if isinstance(value, list) and len(value) != count:
            raise ValueError(f"strobe: {name} lists {len(value)} layers, the model has {count}")
        if isinstance(value, dict) and not set(value) <= set(types):
            raise ValueError(f"strobe: {name} names {sorted(value)}, the model's layer types are {sorted(set(types))}")
    for name in ("full_layers", "force_fa_decode"):
        listed = settings.get(name)
        outside = [i for i in listed if not 0 <= i < count] if isinstance(listed, list) else []
        if outside:
            raise ValueError(f"strobe: {name} names layers {outside}, the model has 0 to {count - 1}")
    return [(kind, layer_of(settings, i, kind)) for i, kind in enumerate(types)]
