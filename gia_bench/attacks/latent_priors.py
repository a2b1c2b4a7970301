"""What a generator's latents look like where it was trained: a penalty beside the distance of the updates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias, final

from torch import Tensor

from gia_bench.attacks.checks import check

LatentPrior: TypeAlias = Callable[[Tensor], Tensor]
"""Latents [N, B, ...] of N candidates -> [N], the weighted penalties."""


@final
@dataclass(frozen=True, kw_only=True)
class KullbackLeibler:
    """weight * KL(N(m, v) || N(0, 1)), with mean m and variance v of a latent's entries, averaged over the batch.

    GGL (Li et al. 2022) asks so that a latent looks like a draw from the standard normal: (m^2 + v - log v - 1) / 2.
    """

    weight: float = 0.1

    def __post_init__(self) -> None:
        check(self.weight >= 0, "kullback_leibler.weight", self.weight, "at least 0")

    def __call__(self, latents: Tensor) -> Tensor:
        entries = latents.flatten(2)
        mean, variance = entries.mean(2), entries.var(2, correction=0).clamp(min=1e-12)
        return self.weight * (mean.square() + variance - variance.log() - 1).mean(1) / 2


@final
@dataclass(frozen=True, kw_only=True)
class LatentNorm:
    """weight * the mean squared entry / 2: minus the log density of the standard normal up to a constant."""

    weight: float

    def __post_init__(self) -> None:
        check(self.weight >= 0, "latent_norm.weight", self.weight, "at least 0")

    def __call__(self, latents: Tensor) -> Tensor:
        return self.weight * latents.flatten(1).square().mean(1) / 2
