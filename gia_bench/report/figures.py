"""Pictures from records: private images beside what was rebuilt, and what privacy costs in accuracy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias, final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import PercentFormatter
from torch import Tensor

from gia_bench.errors import ConfigError, choices
from gia_bench.metrics.statistics import STATISTICS
from gia_bench.records.images import ImagePair, load_images
from gia_bench.records.schema import METRICS
from gia_bench.report.callouts import callouts
from gia_bench.report.control import check_control
from gia_bench.report.results import MissingCellError, Results

_Block: TypeAlias = dict[str, ImagePair]
"""What was rebuilt of the same private images, by "defense, attack"."""


class FigureSpec(Protocol):
    """Draws one picture. ``name`` is that of its file."""

    @property
    def name(self) -> str: ...

    def draw(self, results: Results) -> Figure:
        """Raises ``MissingCellError`` where the records or images for it are absent."""
        ...


@final
@dataclass(frozen=True, kw_only=True)
class ReconstructionGrid:
    """Private images in a row, and below each what every defense and attack left of it, with its PSNR.

    victims: at most so many images of an update; clients: at most so many updates of a round; rounds: which,
    None for all; filters: key -> value or values, as in tables. One seed, the lowest, is drawn.
    """

    name: str = "reconstructions"
    victims: int = 8
    clients: int = 1
    rounds: Sequence[int] | None = None
    filters: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.victims < 1 or self.clients < 1:
            raise ConfigError(
                f"figure {self.name}: victims={self.victims} and clients={self.clients} must be 1 or more."
            )

    def draw(self, results: Results) -> Figure:
        """A row of private images, then one row per defense and attack; rounds and clients stand side by side."""
        blocks = list(self._blocks(results.where(self.filters)))
        if not blocks:
            raise MissingCellError(
                f"figure {self.name}: no run has saved images of these rounds. Run: gia-bench images=true "
                "'attack=[inverting_gradients]' force=true"
            )
        labels = list(dict.fromkeys(label for block in blocks for label in block))
        widths = [min(self.victims, max(len(pair.truth) for pair in block.values())) for block in blocks]
        label_inches = 0.07 * max(len(line) for label in labels for line in label.split("\n"))
        size = (0.4 + label_inches + 1.1 * sum(widths) + 0.3 * len(blocks), 0.5 + 1.25 * (1 + len(labels)))
        figure = Figure(figsize=size, layout="constrained")
        # the first block carries the rows' names
        ratios = [w + (label_inches / 1.1 if i == 0 else 0.3) for i, w in enumerate(widths)]
        parts = figure.subfigures(1, len(blocks), squeeze=False, width_ratios=ratios)[0]
        for part, block, width in zip(parts, blocks, widths, strict=True):
            _draw_block(part, block, width, labels, named=block is blocks[0])
        return figure

    def _blocks(self, results: Results) -> Iterator[_Block]:
        seeds = results.frame.groupby("run_id")["seed"].first()
        chosen = seeds[seeds == seeds.min()].index
        # runs without a defense first; the same private images make one block, whatever attacked them
        labels = sorted((results.labels[r] != "none", results.labels[r], r) for r in chosen)
        attacks = set(results.frame["attack"].dropna())
        blocks: dict[tuple[int, int, bytes], _Block] = {}
        for _, label, run_id in labels:
            for pair in map(load_images, results.runs[run_id].images):
                if pair.attack in attacks and (self.rounds is None or pair.round in self.rounds):
                    place = (pair.round, -1 if pair.client is None else pair.client, pair.truth.numpy().tobytes())
                    blocks.setdefault(place, {})[f"{label}\n{pair.attack}"] = pair
        taken: dict[int, int] = {}
        for place in sorted(blocks):
            taken[place[0]] = taken.get(place[0], 0) + 1
            if taken[place[0]] <= self.clients:
                yield blocks[place]


LEAST_SPAN = 0.05
"""Of test accuracy on an axis: spread over all of it, one test image more would look like a gain."""


@final
@dataclass(frozen=True, kw_only=True)
class PrivacyUtility:
    """Test accuracy against the leak, one point per defense and setting, the Pareto front drawn.

    metric: a leak per victim; a point is its median under the attack that leaks most. Accuracy is the mean over runs of
    the last measured one. filters as in tables. Where there are undefended runs, every other run must be of the same
    experiment: their settings, attacks and seeds.
    """

    name: str = "privacy_utility"
    metric: str = "psnr_db"
    filters: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known = [name for name, quantity in METRICS.items() if quantity.better_for_defender]
        if self.metric not in known:
            raise ConfigError(choices(f"figure {self.name}: metric", self.metric, known))

    def draw(self, results: Results) -> Figure:
        """A scatter plot; up is better for the task, left is better for the defender."""
        points = self.points(results.ended.where(self.filters))
        sign = 1.0 if METRICS[self.metric].better_for_defender == "lower" else -1.0
        front = pareto_front([(sign * leak, -accuracy) for leak, accuracy in points.values()])
        figure = Figure(figsize=(8.0, max(4.2, 0.3 + 0.17 * len(points))), layout="constrained")
        axes = figure.add_subplot()
        along = sorted((list(points.values())[i] for i in front), key=lambda point: sign * point[0])
        line = axes.plot(*zip(*along, strict=True), color="0.7", zorder=1, label="Pareto front")[0]
        # rings, so that a front of one point shows too
        line.set(marker="o", markersize=10, markerfacecolor="none")
        for number, (label, (leak, accuracy)) in enumerate(points.items(), start=1):
            # named beside the axes: names at crowded points would cover each other
            axes.scatter(leak, accuracy, s=22, zorder=2, label=f"{number}  {label}")
        unit = f" [{METRICS[self.metric].unit}]" if METRICS[self.metric].unit else ""
        way = METRICS[self.metric].better_for_defender
        axes.set(xlabel=f"{self.metric}{unit}, strongest attack ({way} is more private)", ylabel="test accuracy")
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.margins(0.15)
        _at_least(axes, LEAST_SPAN)
        axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0)
        _number(figure, axes, list(points.values()))
        return figure

    def points(self, results: Results) -> dict[str, tuple[float, float]]:
        """Label -> (leak, accuracy)."""
        self._check_controls(results)
        frame = results.frame.assign(label=results.frame["run_id"].map(results.labels)).dropna(subset=["value"])
        leaks = frame[frame["metric"] == self.metric].groupby(["label", "attack"])["value"].agg(STATISTICS["median"])
        utility = frame[frame["metric"] == "test_accuracy"]
        last = utility[utility["round"] == utility.groupby("run_id")["round"].transform("max")]
        accuracy = last.groupby("label")["value"].mean()
        strongest = "max" if METRICS[self.metric].better_for_defender == "lower" else "min"
        leak = leaks.groupby("label").agg(strongest)
        for run_id, label in results.labels.items():
            for name, have in ((self.metric, leak), ("test_accuracy", accuracy)):
                if label not in have.index:
                    again = results.command(run_id, force="true")
                    raise MissingCellError(f"figure {self.name}: {label} has no value of {name}. Run: {again}")
        return {str(label): (float(leak[label]), float(accuracy[label])) for label in leak.index}

    def _check_controls(self, results: Results) -> None:
        defenses = results.frame.groupby("run_id")["defense"].first()
        undefended = defenses == "none"
        attacks = results.frame["attack"].dropna().unique().tolist()
        filters = f"figure.{self.name}.filters"
        control = {"defense": "none"}
        controls = defenses.index[undefended].tolist()
        labels = defenses.index.to_series().map(results.labels)[~undefended]
        for label, own in labels.groupby(labels) if controls else ():
            what, members = f"figure {self.name}: {label}", own.index.tolist()
            check_control(results, what, members, controls, control=control, attacks=attacks, filters=filters)


def _at_least(axes: Axes, span: float) -> None:
    low, high = axes.get_ylim()
    room = max(span - (high - low), 0) / 2
    axes.set_ylim(low - room, high + room)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other point beats: at most as large in both coordinates and smaller in one."""
    return [i for i, (x, y) in enumerate(points) if not any(a <= x and b <= y and (a < x or b < y) for a, b in points)]


def _draw_block(part: SubFigure, block: _Block, width: int, labels: Sequence[str], *, named: bool) -> None:
    """The images of one update; ``named``: whether the rows say what they are."""
    first = next(iter(block.values()))
    part.suptitle(
        f"round {first.round}, {'all clients' if first.client is None else f'client {first.client}'}", fontsize=9
    )
    axes = part.subplots(1 + len(labels), width, squeeze=False)
    _row(axes[0], "private" if named else "", first.truth, [""] * width)
    for row, label in zip(axes[1:], labels, strict=True):
        pair = block.get(label)
        if pair is None:
            _row(row, label if named else "", first.truth[:0], [])
            continue
        captions = [f"{value:.1f} dB" if np.isfinite(value) else "failed" for value in pair.psnr_db.tolist()]
        _row(row, label if named else "", pair.reconstruction, captions)


def _row(axes: Sequence[Axes], label: str, images: Tensor, captions: Sequence[str]) -> None:
    """``images``: [n, C, H, W] in [0, 1]; one with NaN is an empty frame."""
    for axis in axes:
        axis.set(xticks=[], yticks=[], frame_on=False)
    for axis, image, caption in zip(axes, images, captions, strict=False):
        pixels = image.movedim(0, -1).nan_to_num(1.0).numpy()
        # a gray image is drawn with fixed limits: matplotlib would stretch its contrast
        axis.imshow(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels, cmap="gray", vmin=0, vmax=1)
        axis.set_frame_on(True)
        axis.set_xlabel(caption, fontsize=8, labelpad=2)
    axes[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)


def _number(figure: Figure, axes: Axes, points: list[tuple[float, float]]) -> None:
    """A number at every point, in their order, with a line to it where others left no room beside it."""
    figure.draw_without_rendering()  # only then is it known where the points are
    scale = 72 / figure.dpi
    where = [(scale * x, scale * y) for x, y in axes.transData.transform(points)]
    for number, (point, at, spot) in enumerate(zip(points, where, callouts(where), strict=True), start=1):
        axes.annotate(
            str(number), point, textcoords="offset points", xytext=(spot[0] - at[0], spot[1] - at[1]), fontsize=7,
            ha="center", va="center", arrowprops={"arrowstyle": "-", "linewidth": 0.4, "color": "0.5", "shrinkB": 2},
        )  # fmt: skip
