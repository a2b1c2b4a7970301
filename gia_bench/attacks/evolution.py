"""CMA-ES for many candidates at once: every generation of all of them is one batch (Hansen 2016; package ``cmaes``)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from cmaes import CMA
from numpy.typing import NDArray
from torch import Tensor

from gia_bench.attacks.base import Snapshots
from gia_bench.attacks.checks import check
from gia_bench.attacks.telling import Telling

log = logging.getLogger(__name__)

Losses = Callable[[Tensor], Tensor]
"""Points [V, T, P, D] -> losses [V, T, P]."""


@final
@dataclass(frozen=True, kw_only=True)
class Evolution:
    """generations: of ``population`` points each, evaluated together; sigma: of the first generation, around its mean.

    Raises ``ConfigError`` for a population below 2, for which there is no best half.
    """

    generations: int = 500
    population: int = 50
    sigma: float = 1.0

    def __post_init__(self) -> None:
        check(self.generations >= 1, "evolution.generations", self.generations, "at least 1")
        check(self.population >= 2, "evolution.population", self.population, "at least 2")
        check(self.sigma > 0, "evolution.sigma", self.sigma, "a number above 0")

    def minimise(
        self,
        losses: Losses,
        means: Tensor,
        seeds: Sequence[Sequence[int]],
        snapshots: Snapshots,
        key: str,
        snapshot_every: int,
    ) -> tuple[Tensor, Tensor]:
        """The best points [V, T, D] and their losses [V, T], infinite where none was finite.

        means: [V, T, D], where each begins; seeds: [V][T]. A candidate of which no point of a generation has a finite
        loss stays as it is from there on. What a killed search had seen is told again to fresh strategies, which then
        ask for the same points: the losses are the whole state.
        """
        V, T, D = means.shape
        begin = means.double().cpu().numpy()
        strategies = [
            [
                CMA(mean=begin[v, t], sigma=self.sigma, seed=seeds[v][t] % 2**32, population_size=self.population)
                for t in range(T)
            ]
            for v in range(V)
        ]
        best, best_loss = begin.copy(), np.full((V, T), np.inf)
        alive = np.ones((V, T), dtype=bool)
        packed = snapshots.load(key)
        told = [] if packed is None else list(packed["losses"].double().numpy())
        telling = Telling()
        for generation in range(self.generations):
            points = np.broadcast_to(begin[:, :, None], (V, T, self.population, D)).copy()
            for v, t in zip(*np.nonzero(alive), strict=True):
                points[v, t] = [strategies[v][t].ask() for _ in range(self.population)]
            if generation == len(told):
                asked = torch.from_numpy(points).to(means)
                told.append(losses(asked).detach().double().cpu().numpy())
            self._tell(strategies, alive, points, told[generation], best, best_loss)
            # only what is new: nothing is written while an old state is told again
            new = packed is None or generation >= len(packed["losses"])
            if new and ((generation + 1) % snapshot_every == 0 or generation + 1 == self.generations):
                snapshots.save(key, {"losses": torch.from_numpy(np.stack(told))})
            if telling.due():
                log.info(
                    "generation %d of %d: the lowest loss so far is %.3g in the median",
                    generation + 1, self.generations, np.median(best_loss),
                )  # fmt: skip
        return torch.from_numpy(best).to(means), torch.from_numpy(best_loss).to(means)

    def _tell(
        self,
        strategies: list[list[CMA]],
        alive: NDArray[np.bool_],
        points: NDArray[np.float64],
        losses: NDArray[np.float64],
        best: NDArray[np.float64],
        best_loss: NDArray[np.float64],
    ) -> None:
        for v, t in zip(*np.nonzero(alive), strict=True):
            own = losses[v, t]
            finite = np.isfinite(own)
            if not finite.any():
                alive[v, t] = False
                continue
            # a point without a loss is worse than all that have one
            ranked = np.where(finite, own, own[finite].max() + 1)
            strategies[v][t].tell(list(zip(points[v, t], ranked.tolist(), strict=True)))
            i = int(ranked.argmin())
            if own[i] < best_loss[v, t]:
                best[v, t], best_loss[v, t] = points[v, t, i], own[i]
