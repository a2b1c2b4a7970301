"""One way to refuse a hyperparameter."""

from __future__ import annotations

from gia_bench.errors import ConfigError


def check(fine: bool, where: str, got: object, want: str) -> None:
    """Raises ``ConfigError`` with the place, what was got and what to give, unless ``fine``."""
    if not fine:
        raise ConfigError(f"{where}={got!r}: give {want}.")
