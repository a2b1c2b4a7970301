"""GGL: generative gradient leakage (Li, Zhang, Liu and Liu, CVPR 2022): CMA-ES over a generator's latents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from gia_bench.attacks.base import Snapshots
from gia_bench.attacks.distances import Distance
from gia_bench.attacks.evolution import Evolution
from gia_bench.attacks.generative import Found, Generative
from gia_bench.attacks.latent_priors import KullbackLeibler, LatentPrior
from gia_bench.attacks.latents import LatentGroup, from_latents
from gia_bench.seeding import derive
from gia_bench.values import Update


@final
@dataclass(frozen=True)
class TensorMean:
    """The mean over the tensors of the update of their squared differences (summed over a tensor's entries)."""

    def __call__(self, dummy: Update, observed: Update) -> Tensor:
        squares = [(dummy[k] - observed[k]).square().sum() for k in observed]
        return torch.stack(squares).mean()


TENSOR_MEAN = TensorMean()
LATENT_PRIORS: Mapping[str, LatentPrior] = {"kullback_leibler": KullbackLeibler()}


@final
@dataclass(frozen=True, kw_only=True)
class GGL(Generative):
    """Without gradients: a population of latents is evaluated at once, and CMA-ES draws the next from its best half.

    For updates of one example. The label is read off the update and told to a generator that takes one. Defaults: the
    released code's (500 generations of 50, penalty on the latent 0.1). gia_bench choices: the first mean is drawn from
    the standard normal (the code: uniform in [0, 1), by nevergrad), and the first sigma is 1. An attacker who knows the
    defense applies its public stand-in to every dummy update (``threat=adaptive``), as GGL does by what it can tell of
    clipping, pruning and Soteria.

    evolution: the strategy; the others: see ``Generative``.
    """

    distance: Distance = TENSOR_MEAN
    latent_priors: Mapping[str, LatentPrior] = field(default_factory=lambda: LATENT_PRIORS)
    evolution: Evolution = field(default_factory=Evolution)
    snapshot_every: int = 10

    @property
    def max_examples(self) -> int | None:
        return 1

    def search(self, group: LatentGroup, snapshots: Snapshots, key: str) -> Found:
        """One strategy per victim and restart; the points of all of them are one batch."""
        start, render = group.latents(), from_latents(group.generator)
        T = start.shape[1]

        def losses(points: Tensor) -> Tensor:
            latents = points.reshape(points.shape[0], -1, *start.shape[2:])
            return group.losses(render, {"latents": latents}).reshape(points.shape[:3])

        seeds = [[derive(seed, "cma", t) for t in range(T)] for seed in group.seeds]
        best, loss = self.evolution.minimise(losses, start.flatten(2), seeds, snapshots, key, self.snapshot_every)
        return Found(group.images(render, {"latents": best.reshape(start.shape)}), loss)
