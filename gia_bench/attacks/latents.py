"""Gradient matching seen from a generator's side: losses of what it is given, and their gradients through it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeAlias, final

import torch
from torch import Tensor

from gia_bench.attacks.group import Group
from gia_bench.attacks.latent_priors import LatentPrior
from gia_bench.attacks.optimizers import Evaluate, Variables
from gia_bench.models.functional import Victim
from gia_bench.seeding import stream


class Generator(Protocol):
    """Any network from latents to images; see ``gia_bench.generators``."""

    @property
    def latent_shape(self) -> tuple[int, ...]: ...

    @property
    def num_classes(self) -> int | None:
        """Of the labels it is told; None: it is told none."""
        ...

    @property
    def fingerprint(self) -> str:
        """Of its weights."""
        ...

    def image_shape(self) -> tuple[int, ...]: ...

    def like(self, tensor: Tensor) -> Generator: ...

    def images(self, latents: Tensor, classes: Tensor, params: Mapping[str, Tensor] | None = None) -> Tensor: ...

    def images_from(self, features: Tensor, layer: int, latents: Tensor, classes: Tensor) -> Tensor: ...

    def features(self, before: Tensor, layer: int, latents: Tensor, classes: Tensor) -> Tensor: ...

    def num_layers(self) -> int: ...

    def params(self) -> dict[str, Tensor]: ...


class GeneratorSource(Protocol):
    """Where a generator comes from."""

    def load(self) -> Generator:
        """Raises ``ConfigError`` or ``DataError`` where there is none to be had."""
        ...


Render: TypeAlias = Callable[[Variables, Tensor], Tensor]
"""(variables [N, ...] of N candidates, classes [N, B, K]) -> images [N, B, C, H, W] in [0, 1]."""


class Drawn(NamedTuple):
    """Some candidates: what is optimised, in tensors with a gradient; pixels [n, B, C, H, W]; penalties [n]."""

    leaves: Variables
    pixels: Tensor
    penalty: Tensor


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class LatentGroup:
    """Victims of one ``Group``, whose images come from one generator.

    classes: [V, T or 1, B, classes], the labels taken by the attack, as probabilities; seeds: one per victim; restarts:
    T; batch: B; penalties: on ``latents``, optimised or fixed.
    """

    group: Group
    generator: Generator
    classes: Tensor
    seeds: Sequence[int]
    restarts: int
    batch: int
    penalties: Mapping[str, LatentPrior]

    def latents(self) -> Tensor:
        """First guesses [V, T, B, *latent_shape], standard normal, from the streams of each victim and restart."""
        shape = (self.batch, *self.generator.latent_shape)
        rows = [
            torch.stack([torch.randn(shape, generator=stream(seed, "latents", t)) for t in range(self.restarts)])
            for seed in self.seeds
        ]
        return torch.stack(rows).to(self.classes)

    def images(self, render: Render, variables: Variables, fixed: Variables | None = None) -> Tensor:
        """What candidates [V, T] show: [V, T, B, C, H, W] in [0, 1]. fixed: variables that are not optimised."""
        space = self.group.space
        with torch.no_grad():
            parts = [space.decode(self._draw(render, *part).pixels) for part in self._parts(variables, fixed or {})]
        return apart(torch.cat(parts), _axes(variables))

    def objective(self, render: Render, fixed: Variables | None = None) -> Evaluate:
        """The losses of variables and their gradients, through the generator."""

        def evaluate(variables: Variables, wanted: Tensor | None = None) -> tuple[Tensor, Variables]:
            axes, parts = _axes(variables), self._parts(variables, fixed or {})
            with torch.enable_grad():
                # only one part's graph is kept at a time: what does not fit into memory at once is drawn twice
                kept = self._draw(render, *parts[0]) if len(parts) == 1 else None
                drawn = [_held(kept or self._draw(render, *part)) for part in parts]
                pixels, penalty = (apart(torch.cat(column), axes) for column in zip(*drawn, strict=True))
                loss, slope = self.group.evaluate({"pixels": pixels}, wanted)
                slopes = torch.split(slope["pixels"].flatten(0, 1), [len(p) for p, _ in drawn])
                pulled = [
                    _pull(kept or self._draw(render, *part), own) for part, own in zip(parts, slopes, strict=True)
                ]
            return loss + penalty, {k: apart(torch.cat([p[k] for p in pulled]), axes) for k in variables}

        return evaluate

    def losses(self, render: Render, variables: Variables) -> Tensor:
        """The losses [V, T] alone, for a search without gradients; T: any number of candidates with the same labels."""
        axes = _axes(variables)
        with torch.no_grad():
            drawn = [_held(self._draw(render, *part)) for part in self._parts(variables, {})]
            pixels, penalty = (apart(torch.cat(column), axes) for column in zip(*drawn, strict=True))
            return self.group.losses({"pixels": pixels}) + penalty

    def _parts(self, variables: Variables, fixed: Variables) -> list[tuple[Variables, Variables, Tensor]]:
        """Candidates, what is fixed of them and their classes, as many at a time as are evaluated at once."""
        axes = _axes(variables)
        flat, given = ({k: v.flatten(0, 1) for k, v in part.items()} for part in (variables, fixed))
        classes = self.classes.expand(*axes, *self.classes.shape[2:]).flatten(0, 1)
        number = len(classes)
        size = self.group.max_batch or number
        pieces = [slice(i, i + size) for i in range(0, number, size)]
        return [({k: v[p] for k, v in flat.items()}, {k: v[p] for k, v in given.items()}, classes[p]) for p in pieces]

    def _draw(self, render: Render, variables: Variables, fixed: Variables, classes: Tensor) -> Drawn:
        leaves = {k: v.detach().requires_grad_() for k, v in variables.items()}
        everything, space = {**fixed, **leaves}, self.group.space
        images = render(everything, classes)
        pixels = space.encode(images)
        penalty = pixels.new_zeros(len(pixels))
        if "latents" in everything:
            penalty = sum((prior(everything["latents"]) for prior in self.penalties.values()), penalty)
        return Drawn(leaves, pixels, penalty)


def from_latents(generator: Generator) -> Render:
    """The images of the variable ``latents`` [N, B, *latent_shape]."""

    def render(variables: Variables, classes: Tensor) -> Tensor:
        latents = variables["latents"]
        return apart(generator.images(latents.flatten(0, 1), classes.flatten(0, 1)), latents.shape[:2])

    return render


def check_generator(generator: Generator, victim: Victim) -> str | None:
    """Why it makes no images for this victim, or None."""
    made = generator.image_shape()
    if made != victim.input_shape:
        return (
            f"the generator makes images of shape {list(made)} and the model takes {list(victim.input_shape)}: train "
            "one with gia-bench-prior on the same dataset (and dataset.size), resize the dataset, or set "
            "generator.image_size where the generator is your own."
        )
    if generator.num_classes not in (None, victim.num_classes):
        return (
            f"the generator is told one of {generator.num_classes} classes and the model has {victim.num_classes}: "
            "train one on the same dataset, or with generator.conditional=false."
        )
    return None


def apart(together: Tensor, axes: Sequence[int]) -> Tensor:
    """The first axis cut into ``axes``: what ``flatten`` had put together."""
    return together.reshape(*axes, *together.shape[1:])


def _axes(variables: Variables) -> tuple[int, int]:
    V, T = next(iter(variables.values())).shape[:2]
    return V, T


def _held(drawn: Drawn) -> tuple[Tensor, Tensor]:
    return drawn.pixels.detach(), drawn.penalty.detach()


def _pull(drawn: Drawn, slope: Tensor) -> Variables:
    """The gradients of sum(slope * pixels) + penalty."""
    total = (drawn.pixels * slope).sum() + drawn.penalty.sum()
    return dict(zip(drawn.leaves, torch.autograd.grad(total, list(drawn.leaves.values())), strict=True))
