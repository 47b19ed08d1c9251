"""Two orders of one argument list: flash-attention-SWAA puts keep_first and force_fa_decode right after softcap."""

import functools
import inspect
import numbers

from torch import Tensor

KEPT = ("keep_first", "force_fa_decode")


def swaa_signature(function) -> tuple[inspect.Signature, int]:
    """The signature in SWAA's order, and how many arguments come before the two."""
    signature = inspect.signature(function)
    parameters = list(signature.parameters.values())
    position = 1 + [p.name for p in parameters].index("softcap")
    kept = [signature.parameters[name].replace(kind=inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in KEPT]
    if parameters[position - 1].default is inspect.Parameter.empty:
        kept = [p.replace(default=inspect.Parameter.empty) for p in kept]
    rest = [p for p in parameters if p.name not in KEPT]
    return signature.replace(parameters=[*rest[:position], *kept, *rest[position:]]), position


def _positional(signature: inspect.Signature) -> list[str]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [name for name, p in signature.parameters.items() if p.kind in kinds]


def _by_keyword(function: str, names, position, args, kwargs):
    """The arguments from `position` on as keywords."""
    if len(args) > len(names):
        raise TypeError(f"{function}: {len(args)} positional arguments are given, it takes at most {len(names)}")
    for name, value in zip(names[position:], args[position:], strict=False):
        if name in kwargs:
            raise TypeError(f"{function}: {name} is given by position {names.index(name) + 1} and by keyword")
        kwargs[name] = value
    return args[:position], kwargs


def swaa_order(function, like=None):
    """`function`, whose signature is that of `like` if given, with its arguments in SWAA's order."""
    like = function if like is None else like
    signature, position = swaa_signature(like)
    names, name = _positional(signature), like.__name__

    @functools.wraps(like)
    def call(*args, **kwargs):
        if len(args) > position:
            args, kwargs = _by_keyword(name, names, position, args, kwargs)
        return function(*args, **kwargs)

    call.__signature__ = signature
    return call


def _whole(value) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


class Order:
    """Tells whose order the positional arguments of a call are in, by their types."""

    def __init__(self, function):
        signature, self.position = swaa_signature(function)
        self.swaa = _positional(signature)
        self.stock = _positional(inspect.signature(function))
        self.name = getattr(function, "__name__", "")
        self.after_bool = self.stock[self.position] == "rotary_interleaved"

    def is_swaa(self, args) -> bool:
        """Called with more than `position` arguments. SWAA's next two are an int and a bool."""
        first, *rest = args[self.position :]
        if not self.after_bool:  # FlashAttention's next is alibi_slopes: never a number
            if isinstance(first, bool) or (rest and _whole(first) and not isinstance(rest[0], bool)):
                self.refuse(args)
            return _whole(first)
        # FlashAttention's next two are rotary_interleaved, a bool that may be written 0 or 1, and alibi_slopes.
        if not rest:
            if _whole(first) and first in (0, 1):
                self.refuse(args)
            return _whole(first)
        if rest[0] is None or isinstance(rest[0], Tensor):
            return False
        if not _whole(first) or not isinstance(rest[0], bool):
            self.refuse(args)
        return True

    def refuse(self, args):
        given = args[self.position :]
        stock, swaa = self.stock[self.position :], self.swaa[self.position :]
        values = ["a tensor" if isinstance(value, Tensor) else repr(value) for value in given]
        form = ", ".join(f"{name}={value}" for name, value in zip(swaa, values, strict=False))
        raise TypeError(
            f"{self.name}: the arguments after softcap are {', '.join(values)}; FlashAttention takes {', '.join(stock)}"
            f" there and flash-attention-SWAA {', '.join(swaa)}, and this is neither or both. Give them by keyword: "
            f"{self.name}(..., {form}), or use flash_attn.swaa.{self.name}, which takes SWAA's order"
        )

    def arranged(self, args, kwargs):
        """(args, kwargs) as the function takes them, from either order."""
        if len(args) > self.position and self.is_swaa(args):
            return _by_keyword(self.name, self.swaa, self.position, args, kwargs)
        return args, kwargs
