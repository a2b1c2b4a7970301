"""What images look like, added to the distance. Each is written for one candidate and mapped, or takes many at once.

Pixels are taken in the searched coordinates (normalised), as the references do.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from gia_bench.attacks.checks import check
from gia_bench.attacks.scene import Candidate, Scene
from gia_bench.models.functional import Victim
from gia_bench.threat import Knowledge
from gia_bench.values import Observation

IMAGES = (-4, -3, -2, -1)
"""The axes of one candidate, [B, C, H, W]."""


class Prior(ABC):
    """A penalty on one candidate: a scalar that is added to the distance.

    leading_axes: whether it also takes candidates with more axes in front, [..., B, C, H, W], and gives a penalty for
    each, [...]. It then looks at no labels and at nothing in the scene that differs between victims.
    """

    leading_axes: ClassVar[bool] = False

    @property
    def requires(self) -> Knowledge:
        """What the observation must show beside what every attack needs."""
        return Knowledge.NONE

    def refusal(self, observation: Observation, victim: Victim) -> str | None:
        """Why this prior cannot use the observation, and what to do; or None."""
        return None

    @abstractmethod
    def __call__(self, candidate: Candidate, scene: Scene) -> Tensor:
        """The weighted penalty."""


@final
@dataclass(frozen=True, kw_only=True)
class TotalVariation(Prior):
    """weight * (mean |dx| + mean |dy|), anisotropic, without borders (Geiping et al. 2020).

    Images of one pixel's width or height have no variation in that direction.
    """

    leading_axes: ClassVar[bool] = True
    weight: float

    def __post_init__(self) -> None:
        check(self.weight >= 0, "total_variation.weight", self.weight, "at least 0")

    def __call__(self, candidate: Candidate, scene: Scene) -> Tensor:
        x = candidate.pixels
        return self.weight * (_mean_abs(x.diff(dim=-1)) + _mean_abs(x.diff(dim=-2)))


@final
@dataclass(frozen=True, kw_only=True)
class PaddedTotalVariation(Prior):
    """Breaching's scale: weight * mean over all pixels of ((|dx| + eps)^inner + (|dy| + eps)^inner)^outer, with one
    line of zeros behind the last row and column, so that its borders count.

    inner, outer: 1 and 1 for anisotropic, 2 and 0.5 for isotropic variation; double_opponents: of R - G, R - B and
    G - B too (one-channel images have none; any other number of channels than one and three is refused).
    """

    leading_axes: ClassVar[bool] = True
    weight: float
    inner: float = 1.0
    outer: float = 1.0
    double_opponents: bool = False
    eps: float = 1e-8

    def __post_init__(self) -> None:
        check(self.weight >= 0, "padded_total_variation.weight", self.weight, "at least 0")
        check(self.inner > 0, "padded_total_variation.inner", self.inner, "a number above 0")
        check(self.outer > 0, "padded_total_variation.outer", self.outer, "a number above 0")

    def refusal(self, observation: Observation, victim: Victim) -> str | None:
        """Opponent colours are of red, green and blue."""
        channels = victim.input_shape[0]
        if not self.double_opponents or channels in (1, 3):
            return None
        return f"double_opponents is for images of 1 or 3 channels, and these have {channels}; take false."

    def __call__(self, candidate: Candidate, scene: Scene) -> Tensor:
        x = candidate.pixels
        if self.double_opponents and x.shape[-3] == 3:
            red, green, blue = x.unbind(-3)
            x = torch.stack([red, green, blue, red - green, red - blue, green - blue], dim=-3)
        # moved by a pixel, with zeros for what comes in: fewer operations than slices of a padded image
        dx, dy = ((nn.functional.pad(x, by) - x).abs() for by in ((-1, 1), (0, 0, -1, 1)))
        if self.inner == self.outer == 1:
            return self.weight * ((dx + dy).mean(IMAGES) + 2 * self.eps)
        across, down = ((d + self.eps).pow(self.inner) for d in (dx, dy))
        return self.weight * (across + down).pow(self.outer).mean(IMAGES)


@final
@dataclass(frozen=True, kw_only=True)
class IsotropicTotalVariation(Prior):
    """weight * mean sqrt(dx^2 + dy^2 + eps), where both differences exist (Rudin, Osher, Fatemi 1992): an edge costs
    the same in any direction. eps keeps the gradient finite where an image is flat.
    """

    leading_axes: ClassVar[bool] = True
    weight: float
    eps: float = 1e-8

    def __post_init__(self) -> None:
        check(self.weight >= 0, "isotropic_total_variation.weight", self.weight, "at least 0")
        check(self.eps > 0, "isotropic_total_variation.eps", self.eps, "a number above 0")

    def __call__(self, candidate: Candidate, scene: Scene) -> Tensor:
        x = candidate.pixels
        dx, dy = x.diff(dim=-1)[..., :-1, :], x.diff(dim=-2)[..., :-1]
        lengths = (dx.square() + dy.square() + self.eps).sqrt()
        return self.weight * lengths.sum(IMAGES) / max(lengths.shape[IMAGES[0] :].numel(), 1)


@final
@dataclass(frozen=True, kw_only=True)
class PixelRange(Prior):
    """weight * the mean squared distance of the image's values from [0, 1]: a soft form of ``boxed``."""

    leading_axes: ClassVar[bool] = True
    weight: float

    def __post_init__(self) -> None:
        check(self.weight >= 0, "pixel_range.weight", self.weight, "at least 0")

    def __call__(self, candidate: Candidate, scene: Scene) -> Tensor:
        x = candidate.inputs
        return self.weight * (x - x.clamp(0, 1)).square().mean(IMAGES)


@final
@dataclass(frozen=True, kw_only=True)
class Norm(Prior):
    """weight * mean x^2 / 2 (breaching's norm with p = 2)."""

    leading_axes: ClassVar[bool] = True
    weight: float

    def __post_init__(self) -> None:
        check(self.weight >= 0, "norm.weight", self.weight, "at least 0")

    def __call__(self, candidate: Candidate, scene: Scene) -> Tensor:
        return self.weight * candidate.pixels.square().mean(IMAGES) / 2


def _mean_abs(x: Tensor) -> Tensor:
    return x.abs().sum(IMAGES) / max(x.shape[IMAGES[0] :].numel(), 1)
