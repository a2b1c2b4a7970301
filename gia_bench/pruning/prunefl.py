"""PruneFL: the server keeps the weights that lower the loss most per second of a round."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from gia_bench.defenses.checks import check
from gia_bench.defenses.selection import Mask, ranks
from gia_bench.errors import ConfigError, IncompatibleError
from gia_bench.models.functional import Victim
from gia_bench.pruning.base import Begun, Pruning, Testimony, Trained
from gia_bench.pruning.initial import InitialPruning
from gia_bench.pruning.scores import everything, prunable
from gia_bench.rows import cut, joined
from gia_bench.values import Batch, Examples, Params, State, Update
from gia_bench.wire import bits_of


@final
@dataclass(frozen=True, kw_only=True)
class PruneFL(Pruning):
    """Adaptive pruning by squared gradients over time (Jiang et al., TNNLS 2022; algorithm and constants of its code).

    Clients add up the squared gradients of all weights over their local steps, and every ``interval`` rounds (after
    rounds interval - 1, 2 interval - 1, ...) send the sums, dense, and start again; G is their weighted mean, of which
    a common factor does not matter. Of every layer's kept weights, the share max_change * 0.5^(t / half_life) with the
    smallest magnitudes are candidates; a weight takes t_i = communication + computation of its layer, in seconds.
    Start with num = the G of everything that stays (biases too), den = constant + the t_i of the kept weights that
    stay; take candidates and pruned weights by descending G_i / t_i while that is above num / den, which each moves.

    density_limit: the most that may be kept, in (0, 1], or None; computation: seconds per weight, one for all layers or
    one each, in the model's order; accumulate: "interval", or "round": only over the round whose sums are sent, without
    a state of the model's size per client.

    initial: the stage before round 0; left out by default, so that the model starts dense.

    A client that does not play in a round of adjustment keeps its sums for the next.
    """

    interval: int = 50
    max_change: float = 0.3
    half_life: float = 10_000
    constant: float = 6.2463948825
    communication: float = 5.561621e-6
    computation: float | Sequence[float] = 0.0
    density_limit: float | None = None
    accumulate: str = "interval"
    initial: InitialPruning = field(default_factory=InitialPruning)

    def __post_init__(self) -> None:
        where = "pruning prunefl: "
        check(where + "interval", self.interval, lambda n: n >= 1 and n == int(n), "be a whole number above 0")
        check(where + "max_change", self.max_change, lambda s: 0 <= s <= 1, "lie in [0, 1]; it is a share")
        check(where + "half_life", self.half_life, lambda r: r > 0, "be above 0 rounds")
        check(where + "constant", self.constant, lambda s: 0 < s < math.inf, "be finite and above 0 seconds")
        for seconds in self._computation:
            check(where + "computation", seconds, lambda s: 0 <= s < math.inf, "be finite and at least 0")
        check(
            where + "communication", self.communication,
            lambda s: 0 <= s < math.inf and s + min(self._computation, default=0) > 0,
            "be finite and at least 0, and above 0 where computation is 0",
        )  # fmt: skip
        if self.density_limit is not None:
            check(where + "density_limit", self.density_limit, lambda d: 0 < d <= 1, "lie in (0, 1], or be null")
        if self.accumulate not in ("interval", "round"):
            raise ConfigError(f"pruning prunefl: accumulate={self.accumulate!r} must be interval or round.")

    @property
    def _computation(self) -> Sequence[float]:
        return [self.computation] if isinstance(self.computation, int | float) else self.computation

    def start(self, victim: Victim, public: Examples) -> Mask:
        """Everything."""
        params, _ = victim.initial()
        names = prunable(victim)
        self._seconds(names)
        return everything(params, names)

    def check_public(self, split: str) -> None:
        """The initial stage trains weights, and accuracy is measured on the test split."""
        if self.initial.rounds and split == "test":
            raise IncompatibleError(
                "pruning prunefl: the initial stage trains weights on public examples, and with public.split=test on "
                "those that accuracy is measured on; set public.split=train and leave some free with "
                "partition.samples_per_client, or pruning.initial.rounds=0."
            )

    def begin(self, victim: Victim, public: Examples) -> Begun:
        """What the initial stage leaves."""
        masks = self.start(victim, public)
        if not self.initial.rounds:
            return Begun(masks, {})
        free = dataclasses.replace(self, density_limit=None)
        return self.initial.run(victim, public, masks, lambda p, m, sums: free.adjust(p, m, sums, self.max_change))

    def strength(self, round_index: int) -> float | None:
        """The share of a layer's kept weights that may go."""
        if (round_index + 1) % self.interval:
            return None
        return float(self.max_change * 0.5 ** (round_index / self.half_life))

    def watches(self, strength: float | None) -> bool:
        """In every round, unless only that of the adjustment counts."""
        return strength is not None or self.accumulate == "interval"

    def remember(self, like: Params) -> State:
        """No gradients yet."""
        return {k: torch.zeros_like(v) for k, v in like.items()} if self.accumulate == "interval" else {}

    def witness(self, seen: State, gradient: Update, batch: Batch) -> State:
        """One more squared gradient; a step without examples counts for nothing."""
        own = {k: torch.where(batch.mask.sum() > 0, g.square(), 0) for k, g in gradient.items()}
        return {k: seen[k] + g if seen else g for k, g in own.items()}

    def asks(self, like: Params, masks: Mask) -> dict[str, Tensor]:
        """The sums, of all parameters."""
        return {k: torch.zeros_like(v) for k, v in like.items()}

    def testify(self, trained: Trained, strength: float | None) -> Testimony:
        """The sums; what was sent is forgotten."""
        total = {k: trained.state[k] + v if trained.state else v for k, v in trained.seen.items()}
        if strength is None:
            return Testimony(trained.update, {}, {k: total[k] for k in trained.state})
        return Testimony(trained.update, total, {k: torch.zeros_like(v) for k, v in trained.state.items()})

    def adjust(self, params: Params, masks: Mask, evidence: dict[str, Tensor], strength: float) -> Mask:
        """What stays, and what pays."""
        stays = {name: _largest_kept(params[name], mask, strength) for name, mask in masks.items()}
        seconds = self._seconds(list(masks))
        flat, gain = joined(stays), joined(evidence, masks).double()
        time = torch.cat([gain.new_full((m.numel(),), seconds[name]) for name, m in masks.items()])
        always = sum(float(g.double().sum()) for name, g in evidence.items() if name not in masks)
        room = None if self.density_limit is None else math.floor(self.density_limit * flat.numel()) - int(flat.sum())
        start = (always + float(gain[flat].sum()), self.constant + float(time[flat].sum()))
        rest = (~flat).nonzero().view(-1)
        kept = flat.index_fill(0, rest[worthwhile(gain[rest], time[rest], *start, room)], True)
        return cut(kept, masks)

    def _seconds(self, names: list[str]) -> dict[str, float]:
        """Seconds per weight, by layer."""
        given = self._computation
        each = list(given) * len(names) if len(given) == 1 else given
        if len(each) != len(names):
            raise ConfigError(
                f"pruning prunefl: computation has {len(each)} numbers, but the model has {len(names)} prunable layers "
                f"({', '.join(names)}); give one for each, or a single one for all."
            )
        return {name: self.communication + seconds for name, seconds in zip(names, each, strict=True)}


def worthwhile(gain: Tensor, time: Tensor, num: float, den: float, room: int | None = None) -> Tensor:
    """Positions among the entries [n] that are taken: by descending gain / time while that is above num / den, both of
    which grow by what is taken, and while there is ``room``. Equal ratios: the first one first.
    """
    ratio = gain / time
    order = ratio.argsort(descending=True, stable=True)
    gains, times = gain[order], time[order]
    before = (num + gains.cumsum(0) - gains) / (den + times.cumsum(0) - times)
    # what is not above the mean leaves it, so that nothing after it is above it either: the first refusal is the last
    refused = (ratio[order] <= before).nonzero()
    count = int(refused[0]) if len(refused) else len(order)
    return order[: count if room is None else min(count, max(room, 0))]


def _largest_kept(weights: Tensor, mask: Tensor, share: float) -> Tensor:
    """The mask without the floor(share n) smallest of its n weights; ties by position, the first one stays."""
    n = int(mask.count_nonzero())
    magnitudes = bits_of(weights.abs()).reshape(-1).masked_fill(~mask.reshape(-1), -1)
    return ranks(magnitudes, 0, n - math.floor(share * n)).view(mask.shape)
