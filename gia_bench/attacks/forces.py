"""What moves the pixels beside the gradient of the loss, and is no part of the loss.

A candidate's loss, and with it the choice of the best iterate and restart, stays a function of that candidate alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from torch import Tensor

from gia_bench.attacks.checks import check
from gia_bench.attacks.optimizers import Moment
from gia_bench.attacks.registration import Registration, Unregistered
from gia_bench.seeding import stream

AS_THEY_ARE = Unregistered()


class Course(NamedTuple):
    """Where a search stands. moment: the step; lr: the learning rate before the schedule; seeds: one per victim."""

    moment: Moment
    lr: float
    seeds: Sequence[int]


class Force(ABC):
    """Sees all candidates of a group at once, and is computed once a step."""

    @abstractmethod
    def __call__(self, pixels: Tensor, course: Course) -> Tensor:
        """What is added to the gradient of pixels [V, T, B, C, H, W], before the optimiser transforms it."""


@final
@dataclass(frozen=True, kw_only=True)
class Langevin(Force):
    """scale * learning rate * standard normal noise, drawn anew for every victim, restart and step (breaching).

    Each draw has a stream of its own, so that a resumed attack and any other company of victims draw the same.
    """

    scale: float

    def __post_init__(self) -> None:
        check(self.scale >= 0, "langevin.scale", self.scale, "at least 0")

    def __call__(self, pixels: Tensor, course: Course) -> Tensor:
        V, T, *shape = pixels.shape
        noise = torch.empty(pixels.shape, dtype=pixels.dtype)
        for v in range(V):
            for t in range(T):
                draw = stream(course.seeds[v], "langevin", t, course.moment.step)
                noise[v, t] = torch.randn(shape, generator=draw, dtype=pixels.dtype)
        if pixels.is_cuda:  # from pinned memory, so that nothing waits for the device
            noise = noise.pin_memory()
        return course.moment.paced(self.scale * course.lr * noise.to(pixels.device, non_blocking=True))


@final
@dataclass(frozen=True, kw_only=True)
class GroupConsistency(Force):
    """Draws the restarts of a victim together: the gradient of weight * ||x - mean of the restarts||_2 / (H W).

    After Yin et al. 2021 (GradInversion), whose restarts run in lock-step; from step ``start`` on. registration: what
    is done to the images before they are averaged: nothing, as in GIFD's code, or moved to one place, which is the
    paper's idea by our means. The mean is taken anew at every step, and stands still in the gradient. With one restart
    nothing happens.
    """

    weight: float
    start: int = 500
    registration: Registration = AS_THEY_ARE

    def __post_init__(self) -> None:
        check(self.weight >= 0, "group_consistency.weight", self.weight, "at least 0")
        check(self.start >= 0, "group_consistency.start", self.start, "at least 0")

    def __call__(self, pixels: Tensor, course: Course) -> Tensor:
        if course.moment.step < self.start:
            return torch.zeros_like(pixels)
        away = pixels - self.registration.mean(pixels)
        length = away.square().sum((2, 3, 4, 5), keepdim=True).sqrt()
        H, W = pixels.shape[-2:]
        return self.weight / (H * W) * away / length.clamp(min=torch.finfo(pixels.dtype).tiny)
