"""Random pruning: the control of every other method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch

from gia_bench.defenses.selection import Mask
from gia_bench.models.functional import Victim
from gia_bench.pruning.base import Pruning
from gia_bench.pruning.scores import Scores, check_cut, prunable, pruned_in_steps
from gia_bench.seeding import stream
from gia_bench.values import Examples, Params


@final
@dataclass(frozen=True, kw_only=True)
class RandomMask(Pruning):
    """Scores from N(0, 1), one global threshold (Tanaka et al. 2020, code).

    density: share kept, in (0, 1]; epochs, schedule ("exponential" | "linear"): the steps on the way; prune_bias:
    biases of linear layers and convolutions too; seed: of the scores.
    """

    density: float = 0.2
    epochs: int = 1
    schedule: str = "exponential"
    prune_bias: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_cut("random", self.density, self.epochs, self.schedule)

    def start(self, victim: Victim, public: Examples) -> Mask:
        """Drawn once."""
        names = prunable(victim, bias=self.prune_bias)

        def scores(params: Params, epoch: int) -> Scores:
            generator = stream(self.seed, "pruning", "random", epoch)
            return {name: torch.randn(params[name].shape, generator=generator) for name in names}

        params, _ = victim.initial()
        return pruned_in_steps(
            params, names, scores, density=self.density, epochs=self.epochs, schedule=self.schedule
        )  # fmt: skip
