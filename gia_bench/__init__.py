"""gia_bench: how much private data can be rebuilt from what a client shares, and what each defense costs."""

from gia_bench import metrics
from gia_bench.models.functional import Victim
from gia_bench.values import Batch, Observation, Reconstruction, Truth

__all__ = ["Batch", "Observation", "Reconstruction", "Truth", "Victim", "metrics"]
