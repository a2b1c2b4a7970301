"""gia_bench: how much private data can be rebuilt from what a client shares, and what each defense costs."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gia_bench import metrics
    from gia_bench.models.functional import Victim
    from gia_bench.values import Batch, Observation, Reconstruction, Truth

__all__ = ["Batch", "Observation", "Reconstruction", "Truth", "Victim", "metrics"]


def __getattr__(name: str) -> Any:
    """Parts are imported when they are asked for: the command line's help needs no torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "metrics":
        return import_module("gia_bench.metrics")
    return getattr(import_module("gia_bench.models.functional" if name == "Victim" else "gia_bench.values"), name)
