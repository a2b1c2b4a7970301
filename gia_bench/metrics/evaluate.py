"""From one reconstruction and the truth to the values that become records."""

from __future__ import annotations

import functools
import math
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias, final

import torch
from torch import Tensor

from gia_bench.errors import ConfigError, choices
from gia_bench.metrics.assignment import NO_MATCH, match
from gia_bench.metrics.images import UnavailableError, mse, psnr_db, ssim, unit_range
from gia_bench.metrics.information import NMI_BINS, nmi
from gia_bench.metrics.lpips import Lpips
from gia_bench.records.schema import METRICS, ORACLE, Better, Status
from gia_bench.values import Reconstruction, Truth

ImageMetric: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""From images and truth, [n, C, H, W] in [0, 1], to [n]."""

IMAGE_METRICS: Mapping[str, ImageMetric] = {"mse": mse, "psnr_db": psnr_db, "ssim": ssim, "nmi": nmi}
LABELS = "label_accuracy"
FLAT = "oracle_flat_psnr_db"
NOBODY = "no example is behind this update: an empty batch, of which there is nothing to rebuild"


@final
@dataclass(frozen=True, kw_only=True)
class Metrics:
    """What is measured on a reconstruction.

    names: any of mse, psnr_db, ssim, nmi, label_accuracy; lpips: which LPIPS nets, or None; nmi_bins: of the histogram
    over [0, 1] behind NMI, at least 2. Raises ``ConfigError`` for an unknown name or fewer bins.
    """

    names: Sequence[str] = ("mse", "psnr_db", "ssim", LABELS)
    lpips: Lpips | None = field(default_factory=Lpips)
    nmi_bins: int = NMI_BINS

    def __post_init__(self) -> None:
        if not isinstance(self.nmi_bins, int) or self.nmi_bins < 2:
            raise ConfigError(f"metrics.nmi_bins={self.nmi_bins!r} must be a whole number of at least 2.")
        for name in self.names:
            if name not in (*IMAGE_METRICS, LABELS):
                raise ConfigError(choices("metrics.names", name, (*IMAGE_METRICS, LABELS)))

    @property
    def per_image(self) -> dict[str, ImageMetric]:
        """The chosen image metrics by record name."""
        known: dict[str, ImageMetric] = {**IMAGE_METRICS, "nmi": functools.partial(nmi, bins=self.nmi_bins)}
        chosen = {name: known[name] for name in self.names if name in known}
        nets = self.lpips.nets if self.lpips else ()
        return chosen | {f"lpips_{net}": functools.partial(self.lpips.distance, net) for net in nets if self.lpips}


@final
@dataclass(frozen=True, kw_only=True)
class Value:
    """One number about one truth image (``victim``: its index), or about the batch (``victim`` None)."""

    metric: str
    victim: int | None
    value: float | None
    status: Status = "ok"
    reason: str | None = None

    @property
    def unit(self) -> str | None:
        """The metric's unit, None for a bare number."""
        return METRICS[self.metric].unit

    @property
    def better_for_defender(self) -> Better | None:
        """Which way is better for the defender."""
        return METRICS[self.metric].better_for_defender


@final
@dataclass(frozen=True, eq=False)
class Scores:
    """All values of one reconstruction. ``matching``: [n] int64, for every truth image its reconstruction or -1."""

    values: tuple[Value, ...]
    matching: Tensor

    def of(self, metric: str) -> list[float | None]:
        """A metric's values in the order of the truth images; None where it failed or is unavailable."""
        found = [value.value for value in self.values if value.metric == metric]
        if not found:
            raise ConfigError(choices("metric", metric, {value.metric for value in self.values}))
        return found

    def median(self, metric: str) -> float | None:
        """The median of the values that exist, or None."""
        present = [value for value in self.of(metric) if value is not None]
        return statistics.median(present) if present else None

    def aligned(self, images: Tensor) -> Tensor:
        """``images`` [m, C, H, W] in the order of the truth: [n, C, H, W], clamped to [0, 1]; NaN where unmatched."""
        rows = torch.full((len(self.matching), *images.shape[1:]), math.nan)
        found = self.matching != NO_MATCH
        rows[found] = unit_range(images)[self.matching[found]]
        return rows


def evaluate(reconstruction: Reconstruction, truth: Truth, metrics: Metrics | None = None) -> Scores:
    """Score ``reconstruction`` against the private images: clamped to [0, 1], matched once for all metrics.

    One value per truth image and image metric, and one label accuracy for the batch; beside the PSNR that of a flat
    image of the truth's own mean colour, per channel, which an attack has to beat to have rebuilt anything. Of an
    ensemble also the best that it could have chosen, had it known the truth (``oracle_...``). What cannot be scored is
    a value with status "failed" (no reconstruction) or "unavailable" (the metric does not exist here) and its reason,
    never a number; of no truth image at all, one of each metric is unavailable. Raises ``ConfigError`` where the
    images' shapes differ.
    """
    metrics = metrics or Metrics()
    if not len(truth.inputs):
        names = [*metrics.per_image, *(n for n in metrics.names if n == LABELS)]
        nothing = [Value(metric=n, victim=None, value=None, status="unavailable", reason=NOBODY) for n in names]
        return Scores(tuple(nothing), torch.empty(0, dtype=torch.int64))
    values, matching = _leak(reconstruction, truth, metrics)
    if reconstruction.alternatives:
        values += _upper_bound([_leak(one, truth, metrics)[0] for one in reconstruction.alternatives.values()])
    private = unit_range(truth.inputs)
    if "psnr_db" in metrics.names:
        flat = private.mean((2, 3), keepdim=True).expand_as(private)
        values += [_value(FLAT, i, number, "") for i, number in enumerate(psnr_db(flat, private).tolist())]
    if LABELS in metrics.names:
        values.append(_label_accuracy(reconstruction, truth))
    return Scores(tuple(values), matching)


def _leak(reconstruction: Reconstruction, truth: Truth, metrics: Metrics) -> tuple[list[Value], Tensor]:
    """All image metrics of one reconstruction, and its matching."""
    images, private = unit_range(reconstruction.inputs), unit_range(truth.inputs)
    if reconstruction.failure is None:
        matching = match(images, private)
    else:
        matching = torch.full((len(private),), NO_MATCH, dtype=torch.int64)
    absent = reconstruction.failure or _why_absent(images, private)
    values = [
        value
        for name, measure in metrics.per_image.items()
        for value in _score(name, measure, images, private, matching, absent)
    ]
    return values, matching


def _upper_bound(candidates: Sequence[Sequence[Value]]) -> list[Value]:
    """Metric by metric and victim by victim, the value of the candidate that leaks most."""
    bound = []
    for same in zip(*candidates, strict=True):
        present = [v for v in same if v.value is not None]
        most = max if same[0].better_for_defender == "lower" else min
        best = most(present, key=lambda v: v.value or 0.0) if present else same[0]
        bound.append(replace(best, metric=f"{ORACLE}{best.metric}"))
    return bound


def _score(
    name: str, measure: ImageMetric, images: Tensor, private: Tensor, matching: Tensor, absent: str
) -> list[Value]:
    found = (matching != NO_MATCH).nonzero().flatten()
    try:
        numbers = measure(images[matching[found]], private[found]).tolist() if len(found) else []
    except UnavailableError as why:
        return [
            Value(metric=name, victim=i, value=None, status="unavailable", reason=str(why)) for i in range(len(private))
        ]
    scored = dict(zip(found.tolist(), numbers, strict=True))
    return [_value(name, i, scored.get(i), absent) for i in range(len(private))]


def _value(name: str, victim: int, number: float | None, absent: str) -> Value:
    if number is None:
        return Value(metric=name, victim=victim, value=None, status="failed", reason=absent)
    if not math.isfinite(number):
        return Value(metric=name, victim=victim, value=None, status="failed", reason=f"the value is {number}")
    return Value(metric=name, victim=victim, value=number)


def _why_absent(images: Tensor, private: Tensor) -> str:
    broken = int((~images.flatten(1).isfinite().all(1)).sum())
    return f"no reconstruction for this image: {len(images)} for {len(private)} images, {broken} of them not finite"


def _label_accuracy(reconstruction: Reconstruction, truth: Truth) -> Value:
    """The share of labels found, as multisets: the order of an attack's labels says nothing."""
    if reconstruction.failure is not None:
        return Value(metric=LABELS, victim=None, value=None, status="failed", reason=reconstruction.failure)
    if reconstruction.labels is None:
        return Value(metric=LABELS, victim=None, value=None, status="unavailable", reason="the attack gives no labels")
    guessed, real = reconstruction.labels.flatten().tolist(), truth.labels.flatten().tolist()
    common = (Counter(guessed) & Counter(real)).total()
    return Value(metric=LABELS, victim=None, value=common / max(len(guessed), len(real)))
