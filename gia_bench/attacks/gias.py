"""GIAS: gradient inversion in alternative spaces (Jeon, Kim, Lee, Oh and Ok, NeurIPS 2021): latents, then weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import final

from torch import Tensor
from torch.func import vmap

from gia_bench.attacks.base import Snapshots
from gia_bench.attacks.checks import check
from gia_bench.attacks.distances import Cosine, Distance
from gia_bench.attacks.generative import Found, Generative, best_of
from gia_bench.attacks.latents import Generator, LatentGroup, Render, from_latents
from gia_bench.attacks.optimize import Progress, Search
from gia_bench.attacks.optimizers import Adam, Evaluate, Optimizer, Variables
from gia_bench.attacks.priors import Prior, TotalVariation
from gia_bench.attacks.schedules import Schedule


@final
@dataclass(frozen=True, kw_only=True)
class RampUpDown:
    """Up in a straight line over the first share ``up`` of all steps, down along half a cosine over the last ``down``.

    Defaults: the released code's, which has it from StyleGAN's projector.
    """

    up: float = 0.05
    down: float = 0.75

    def __post_init__(self) -> None:
        check(0 <= self.up <= 1, "ramp_up_down.up", self.up, "a share from 0 to 1")
        check(0 < self.down <= 1, "ramp_up_down.down", self.down, "a share above 0, at most 1")

    def __call__(self, step: int, steps: int) -> float:
        passed = step / steps
        rising = min(1.0, passed / self.up) if self.up else 1.0
        return rising * (1 - math.cos(math.pi * min(1.0, (1 - passed) / self.down))) / 2


COSINE, LATENT_ADAM, WEIGHT_ADAM, RAMP = Cosine(), Adam(lr=0.03), Adam(lr=1e-3), RampUpDown()
PRIORS: Mapping[str, Prior] = {"total_variation": TotalVariation(weight=1e-6)}


@final
@dataclass(frozen=True, kw_only=True)
class GIAS(Generative):
    """First the latents are searched by gradient descent; then, with these fixed, the generator's own parameters.

    Every victim and restart fine-tunes a generator of its own; the images of one update share it (gia_bench choice).
    Its BatchNorm statistics stay. Defaults: the released code's learning rates (its StyleGAN2 one for the parameters),
    schedule and total variation; the numbers of steps are those of GIFD's re-implementation.

    steps, optimizer: of the latents; tuning_steps (0: none), tuning_optimizer: of the parameters; schedule: of both;
    the others: see ``Generative``.
    """

    distance: Distance = COSINE
    priors: Mapping[str, Prior] = field(default_factory=lambda: PRIORS)
    steps: int = 1_000
    optimizer: Optimizer = LATENT_ADAM
    tuning_steps: int = 8_000
    tuning_optimizer: Optimizer = WEIGHT_ADAM
    schedule: Schedule = RAMP

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.steps >= 1, "attack.steps", self.steps, "at least 1")
        check(self.tuning_steps >= 0, "attack.tuning_steps", self.tuning_steps, "at least 0")

    def check_generator(self, generator: Generator) -> None:
        """Its parameters must be changeable for one victim."""
        generator.params()

    def search(self, group: LatentGroup, snapshots: Snapshots, key: str) -> Found:
        generator, render = group.generator, from_latents(group.generator)
        start = {"latents": group.latents()}
        found = self._run(group.objective(render), start, self.steps, self.optimizer, snapshots, f"{key}-latents")
        latent = Found(group.images(render, found.best), found.best_loss, found.diverged)
        if not self.tuning_steps:
            return latent
        V, T = found.best_loss.shape
        weights = {f"generator.{k}": v.expand(V, T, *v.shape).clone() for k, v in generator.params().items()}
        fixed, render = {"latents": found.best["latents"]}, _tuned(generator)
        tuned = self._run(
            group.objective(render, fixed), weights, self.tuning_steps, self.tuning_optimizer, snapshots,
            f"{key}-parameters",
        )  # fmt: skip
        return best_of(latent, Found(group.images(render, tuned.best, fixed), tuned.best_loss, tuned.diverged))

    def _run(
        self, evaluate: Evaluate, start: Variables, steps: int, optimizer: Optimizer, snapshots: Snapshots, key: str
    ) -> Progress:
        search = Search(
            evaluate=evaluate, push=None, optimizer=optimizer, schedule=self.schedule, clamp=lambda v: v, steps=steps,
            stop_below=None, snapshot_every=self.snapshot_every,
        )  # fmt: skip
        return search.run(start, snapshots, key)


def _tuned(generator: Generator) -> Render:
    """The images of fixed latents under parameters of each candidate's own."""

    def one(params: Variables, latents: Tensor, classes: Tensor) -> Tensor:
        return generator.images(latents, classes, params=params)

    def render(variables: Variables, classes: Tensor) -> Tensor:
        params = {k.removeprefix("generator."): v for k, v in variables.items() if k != "latents"}
        images: Tensor = vmap(one)(params, variables["latents"], classes)
        return images

    return render
