"""Settings held against the types that their targets declare, before anything is built from them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hydra.utils import get_object

from gia_bench.errors import ConfigError

_FITS: Mapping[str, Callable[[Any], bool]] = {
    "int": lambda v: isinstance(v, int) and not isinstance(v, bool),
    "float": lambda v: isinstance(v, (int, float)) and not isinstance(v, bool),
    "bool": lambda v: isinstance(v, bool),
    "str": lambda v: isinstance(v, str),
    "None": lambda v: v is None,
    "Sequence[int]": lambda v: _all(v, "int"),
    "Sequence[float]": lambda v: _all(v, "float"),
    "Sequence[str]": lambda v: _all(v, "str"),
}
_WORDS = {
    "int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "None": "null",
    "Sequence[int]": "a list of whole numbers, such as [0,10]", "Sequence[float]": "a list of numbers",
    "Sequence[str]": "a list of names",
}  # fmt: skip


def check_types(settings: Any, path: str) -> None:
    """Raises ``ConfigError`` for a value below ``path`` that is not of the plain type its ``_target_`` declares.

    Only plain types are looked at (numbers, text, true or false, null, lists of them), and only gia_bench's own
    targets: what else a target takes, it checks itself.
    """
    if isinstance(settings, Mapping):
        target = settings.get("_target_")
        if isinstance(target, str) and target.startswith("gia_bench."):
            check_call(get_object(target), settings, path)
        for key, value in settings.items():
            check_types(value, f"{path}.{key}")
    elif isinstance(settings, (list, tuple)):
        for place, value in enumerate(settings):
            check_types(value, f"{path}[{place}]")


def check_call(target: Callable[..., Any], arguments: Mapping[str, Any], path: str) -> None:
    """The same for the arguments of one call."""
    for name, parameter in signature_of(target).parameters.items():
        # a string, since every module postpones its annotations
        if name in arguments:
            check_value(arguments[name], str(parameter.annotation), f"{path}.{name}")


def signature_of(target: Callable[..., Any]) -> inspect.Signature:
    """What a call takes: a preset, which takes any ``**parts``, what the class of its result takes."""
    signature = inspect.signature(target)
    if inspect.isfunction(target) and any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values()):
        return inspect.signature(target.__globals__[target.__annotations__["return"]])
    return signature


def check_value(value: Any, declared: str, path: str) -> None:
    """The same for one value; declared: its type as it is written, such as ``int | None``."""
    kinds = declared.split(" | ")
    if all(kind in _FITS for kind in kinds) and not any(_FITS[kind](value) for kind in kinds):
        raise ConfigError(f"{path}={value!r}: give {', or '.join(_WORDS[kind] for kind in kinds)}.")


def _all(values: Any, kind: str) -> bool:
    return isinstance(values, Sequence) and not isinstance(values, str) and all(_FITS[kind](v) for v in values)
