"""One sentence for every hyperparameter that is out of its range."""

from __future__ import annotations

from collections.abc import Callable

from gia_bench.errors import ConfigError


def check(where: str, value: object, inside: Callable[[float], bool], rule: str) -> None:
    """Raises ``ConfigError`` unless ``value`` is a number for which ``inside`` holds; ``rule`` goes on after "must"."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not inside(value):
        raise ConfigError(f"{where}={value!r} must {rule}.")
