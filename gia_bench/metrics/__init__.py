"""How much of the truth a reconstruction shows: ``evaluate(reconstruction, truth)``."""

from gia_bench.metrics.assignment import match
from gia_bench.metrics.evaluate import Metrics, Scores, Value, evaluate
from gia_bench.metrics.images import UnavailableError
from gia_bench.metrics.lpips import Lpips
from gia_bench.metrics.statistics import Summary, paired_difference, summarize

__all__ = [
    "Lpips",
    "Metrics",
    "Scores",
    "Summary",
    "UnavailableError",
    "Value",
    "evaluate",
    "match",
    "paired_difference",
    "summarize",
]
