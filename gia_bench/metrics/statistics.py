"""From values per victim to a number with its uncertainty."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap, t

from gia_bench.errors import ConfigError, choices

Statistic: TypeAlias = Literal["median", "mean"]
Interval: TypeAlias = Literal["bootstrap", "student_t"]
STATISTICS: Mapping[str, Callable[..., np.float64]] = {"median": np.median, "mean": np.mean}
CONFIDENCE = 0.95
RESAMPLES = 2000
BATCH = 100
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A statistic of ``num_victims`` values; ``num_failed`` more gave none. low, high: its 95 % interval, if any."""

    value: float
    low: float | None
    high: float | None
    num_victims: int
    num_failed: int = 0


def summarize(
    values: Sequence[float],
    *,
    statistic: Statistic = "median",
    num_failed: int = 0,
    interval: Interval = "bootstrap",
) -> Summary | None:
    """The median or mean of ``values`` with its 95 % interval: a percentile bootstrap (2,000 resamples, one fixed
    stream), or Student's t of a mean, for the few seeds of an experiment, of which a bootstrap never leaves the range.

    None for no values. One value has no interval; equal values have an interval of no width. The interval says how much
    another choice of victims would move the statistic, no more. Raises ``ConfigError`` for an unknown statistic or
    interval, Student's t of a median, or a value that is not finite.
    """
    if statistic not in STATISTICS:
        raise ConfigError(choices("statistic", statistic, STATISTICS))
    if interval not in INTERVALS:
        raise ConfigError(choices("interval", interval, INTERVALS))
    if interval == "student_t" and statistic != "mean":
        raise ConfigError("interval=student_t is of a mean; take statistic=mean, or interval=bootstrap.")
    if not all(map(math.isfinite, values)):
        raise ConfigError("summarize: a value is not finite. Count it as failed instead.")
    if not values:
        return None
    data = np.asarray(values, dtype=np.float64)
    low, high = INTERVALS[interval](data, STATISTICS[statistic]) if len(data) > 1 else (None, None)
    value = float(STATISTICS[statistic](data))
    return Summary(value=value, low=low, high=high, num_victims=len(data), num_failed=num_failed)


def _bootstrap(data: NDArray[np.float64], reduce: Callable[..., np.float64]) -> tuple[float, float]:
    # in batches: all resamples of 10,000 victims at once would be 160 MB
    found = bootstrap(
        (data,), reduce, n_resamples=RESAMPLES, batch=BATCH, confidence_level=CONFIDENCE, method="percentile",
        rng=np.random.default_rng(0),
    )  # fmt: skip
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def _student_t(data: NDArray[np.float64], reduce: Callable[..., np.float64]) -> tuple[float, float]:
    half = t.ppf((1 + CONFIDENCE) / 2, len(data) - 1) * data.std(ddof=1) / math.sqrt(len(data))
    return float(data.mean() - half), float(data.mean() + half)


INTERVALS: Mapping[str, Callable[..., tuple[float, float]]] = {"bootstrap": _bootstrap, "student_t": _student_t}


def paired_difference(
    condition: Mapping[Key, float | None], control: Mapping[Key, float | None], *, statistic: Statistic = "median"
) -> Summary | None:
    """Statistic of ``condition - control`` over the victims that have a value in both; the rest counts as failed.

    The keys name a victim, for example (seed, round, client, victim). Raises as ``summarize`` does.
    """
    victims = condition.keys() | control.keys()
    pairs = [(condition.get(key), control.get(key)) for key in victims]
    # sorted: the bootstrap's draws must not depend on the order of a set
    differences = sorted(a - b for a, b in pairs if a is not None and b is not None)
    return summarize(differences, statistic=statistic, num_failed=len(victims) - len(differences))
