"""CENSOR: instead of the update, a random direction at right angles to it is sent."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from torch.func import vmap

from gia_bench.defenses.base import Client, Defense
from gia_bench.defenses.checks import check
from gia_bench.errors import ConfigError, choices
from gia_bench.values import Batch, Noise, Observation, Params, Shared, State, Update

PROJECTIONS = ("corrected", "published")


@final
@dataclass(frozen=True, kw_only=True)
class Censor(Defense):
    """Of ``trials`` random candidates the one that a small step leaves with the lowest loss (Zhang et al. 2025).

    A candidate is, per tensor g of the update, a standard normal v of length 1, less its part along g, brought to the
    length of g. projection: "corrected" takes v - (<v, g> / ||g||^2) g, which is at right angles to g; "published"
    divides by ||g|| only, as the authors' code does, which is that only where ||g|| = 1.

    trials: >= 1; step: what a candidate is multiplied by before it is subtracted from the broadcast model, > 0. The
    loss is the model's own (cross-entropy) in evaluation mode, over the examples of all local steps; the authors have
    one. candidates_at_once: how many are evaluated together; changes memory, not numbers. The random numbers themselves
    take ``trials`` times the model, for every client of an executor's chunk.

    gia_bench choices: under "corrected" a tensor of one entry is sent as 0, since nothing else is at right angles to a
    number; losses are computed in double precision, because at right angles to the gradient a step of 1e-4 changes
    them by less than single precision shows.
    """

    projection: str = "corrected"
    trials: int = 20
    step: float = 1e-4
    candidates_at_once: int = 4

    def __post_init__(self) -> None:
        if self.projection not in PROJECTIONS:
            raise ConfigError(choices("defense censor: projection", self.projection, PROJECTIONS))
        for name in ("trials", "candidates_at_once"):
            check(
                f"defense censor: {name}", getattr(self, name), lambda n: n >= 1 and n == int(n),
                "be a whole number of at least 1",
            )  # fmt: skip
        check("defense censor: step", self.step, lambda s: 0 < s < math.inf, "be finite and above 0")

    def draw(self, like: Params, batch: Batch, generator: torch.Generator) -> Noise:
        """Standard normal numbers [trials, ...] by parameter name, float32 on the CPU."""
        return {k: torch.randn(int(self.trials), *p.shape, generator=generator) for k, p in like.items()}

    def protect(
        self, update: Update, client: Client, state: State, shared: Shared, noise: Noise
    ) -> tuple[Update, State]:
        """The best candidate. NaN and infinity make a tensor NaN, so that the server sees them."""
        noise = {k: v.to(update[k].device) for k, v in noise.items()}
        everything = Batch(*(_double(t).flatten(0, 1) for t in client.batch))
        params, buffers = ({k: _double(v) for k, v in tensors.items()} for tensors in (client.params, client.buffers))

        def loss(directions: Update) -> Tensor:
            candidate = self._candidate(directions, update)
            moved = {k: p - self.step * candidate[k] for k, p in params.items()}
            logits, _ = client.victim.logits(moved, buffers, everything.inputs, training=False)
            total: Tensor = (client.victim.loss(logits, everything.labels) * everything.mask).sum()
            return total

        best = vmap(loss, chunk_size=int(self.candidates_at_once))(noise).argmin()
        chosen = self._candidate({k: v.index_select(0, best[None])[0] for k, v in noise.items()}, update)
        return {k: chosen[k].to(u.dtype) for k, u in update.items()}, state

    def surrogate(self, update: Update, observation: Observation) -> Update:
        """The dummy update's candidate in the observed direction: under "corrected", the true update gives exactly what
        was observed."""
        stand_in = self._candidate(observation.update, update)
        return {k: stand_in[k].to(u.dtype) for k, u in update.items()}

    def _candidate(self, directions: Update, update: Update) -> Update:
        """By parameter name, float64."""
        return {k: self._turned(directions[k].double(), u.double()) for k, u in update.items()}

    def _turned(self, v: Tensor, g: Tensor) -> Tensor:
        """``v`` without its part along ``g``, of g's length."""
        if self.projection == "corrected" and g.numel() == 1:
            return g - g  # 0, and NaN where g is not finite
        length = _length(g)
        v = v / _or_one(_length(v))
        along = (v * g).sum() / _or_one(length) ** (2 if self.projection == "corrected" else 1)
        left = v - along * g
        return left * (length / _or_one(_length(left)))


def _length(t: Tensor) -> Tensor:
    """||t||, 0 with a gradient of 0 where t is 0."""
    square = t.square().sum()
    zero = square == 0
    # the inner where keeps a zero's gradient finite
    return torch.where(zero, 0, torch.where(zero, 1, square).sqrt())


def _or_one(length: Tensor) -> Tensor:
    return torch.where(length == 0, 1, length)


def _double(t: Tensor) -> Tensor:
    return t.double() if t.is_floating_point() else t
