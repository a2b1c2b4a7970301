"""GIFD: generative gradient inversion with feature domain optimization (Fang et al., ICCV 2023)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from gia_bench.attacks.base import Snapshots
from gia_bench.attacks.checks import check
from gia_bench.attacks.distances import Cosine, Distance
from gia_bench.attacks.generative import Found, Generative, best_of
from gia_bench.attacks.latents import Generator, LatentGroup, Render, apart
from gia_bench.attacks.optimize import Search
from gia_bench.attacks.optimizers import Adam, Optimizer, Variables
from gia_bench.attacks.priors import Norm, Prior, TotalVariation
from gia_bench.attacks.schedules import Constant, Schedule

COSINE, OPTIMIZER, CONSTANT = Cosine(), Adam(lr=0.1), Constant()
PRIORS: Mapping[str, Prior] = {"total_variation": TotalVariation(weight=1e-4), "norm": Norm(weight=1e-6)}
RADII = (0.1, 0.2, 0.3)


@final
@dataclass(frozen=True, kw_only=True)
class GIFD(Generative):
    """First the latents are searched, then what the generator's first layer makes of them, then its second, and so on
    up to the last but one; every search begins where the one before ended.

    The features of every image stay within an l1 ball around where their search began, so that they do not leave what
    the generator can make; what each layer ended with competes, and the lowest loss is returned. radii: of the balls,
    as shares of the l1 norm of the features they begin with, one per layer, the last one for all further layers
    (gia_bench choice: the authors' are absolute numbers for BigGAN's features, growing from layer to layer too).

    steps: of the latents and of each layer; optimizer, schedule: of all; num_layers: how many are searched, at most
    (None: all but the last); the others: see ``Generative``. Defaults: the released code's.
    """

    distance: Distance = COSINE
    priors: Mapping[str, Prior] = field(default_factory=lambda: PRIORS)
    restarts: int = 4
    steps: int = 1_000
    optimizer: Optimizer = OPTIMIZER
    schedule: Schedule = CONSTANT
    radii: Sequence[float] = RADII
    num_layers: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "radii", tuple(self.radii))  # a config gives a list
        check(self.steps >= 1, "attack.steps", self.steps, "at least 1")
        fine = bool(self.radii) and min(self.radii, default=0) > 0
        check(fine, "attack.radii", self.radii, "one number above 0 or more")
        fine = self.num_layers is None or self.num_layers >= 0
        check(fine, "attack.num_layers", self.num_layers, "at least 0, or null for all but the last")

    def check_generator(self, generator: Generator) -> None:
        """It must be a chain of layers."""
        generator.num_layers()

    def search(self, group: LatentGroup, snapshots: Snapshots, key: str) -> Found:
        generator = group.generator
        between = generator.num_layers() - 1
        deepest = between if self.num_layers is None else min(self.num_layers, between)
        variables: Variables = {"latents": group.latents()}
        fixed: Variables = {}
        ends: list[Found] = []
        for layer in range(deepest + 1):
            clamp: Callable[[Variables], Variables] = _unchanged
            if layer:
                before = next(iter(variables.values()))
                variables = {"features": _features(group, before, layer - 1, fixed["latents"])}
                radius = self.radii[min(layer, len(self.radii)) - 1]
                clamp = _ball(variables["features"], radius)
            render = _from(generator, layer)
            search = Search(
                evaluate=group.objective(render, fixed), push=None, optimizer=self.optimizer, schedule=self.schedule,
                clamp=clamp, steps=self.steps, stop_below=None, snapshot_every=self.snapshot_every,
            )  # fmt: skip
            end = search.run(variables, snapshots, f"{key}-layer{layer}")
            ends.append(Found(group.images(render, end.best, fixed), end.best_loss, end.diverged))
            variables = end.best
            if not layer:
                fixed = end.best  # a penalty on the latents counts for every layer alike, and a layer may be told them
        return best_of(*ends)


def project(points: Tensor, centre: Tensor, radius: Tensor) -> Tensor:
    """The nearest points [N, D] within l1 balls of ``radius`` [N] around ``centre`` [N, D] (Duchi et al. 2008)."""
    away = points - centre
    size = away.abs()
    ordered = size.sort(1, descending=True).values
    surplus = ordered.cumsum(1) - radius[:, None]
    count = torch.arange(1, size.shape[1] + 1, device=size.device, dtype=size.dtype)
    kept = (ordered * count > surplus).sum(1, keepdim=True).clamp(min=1)
    threshold = (surplus.gather(1, kept - 1) / kept).clamp(min=0)
    inside = size.sum(1, keepdim=True) <= radius[:, None]
    return torch.where(inside, points, centre + away.sign() * (size - threshold).clamp(min=0))


def _unchanged(variables: Variables) -> Variables:
    return variables


def _ball(centre: Tensor, share: float) -> Callable[[Variables], Variables]:
    """Keeps the features [V, T, B, ...] of every image in its ball around ``centre``."""
    flat = centre.flatten(0, 2).flatten(1)
    radius = share * flat.abs().sum(1)

    def clamp(variables: Variables) -> Variables:
        return {"features": project(variables["features"].flatten(0, 2).flatten(1), flat, radius).view_as(centre)}

    return clamp


def _features(group: LatentGroup, before: Tensor, layer: int, latents: Tensor) -> Tensor:
    """What ``layer`` makes of the best that was found before it, [V, T, B, ...]."""
    classes = group.classes.expand(*before.shape[:2], *group.classes.shape[2:])
    with torch.no_grad():
        made = group.generator.features(before.flatten(0, 2), layer, latents.flatten(0, 2), classes.flatten(0, 2))
    return apart(made, before.shape[:3])


def _from(generator: Generator, layer: int) -> Render:
    """The images of the latents (layer 0) or of the features after ``layer`` layers."""

    def render(variables: Variables, classes: Tensor) -> Tensor:
        latents = variables["latents"]
        flat, told = latents.flatten(0, 1), classes.flatten(0, 1)
        if layer:
            made = generator.images_from(variables["features"].flatten(0, 1), layer, flat, told)
        else:
            made = generator.images(flat, told)
        return apart(made, latents.shape[:2])

    return render
