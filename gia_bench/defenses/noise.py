"""Independent noise on every entry of the update, by standard deviation or variance.

The papers say "noise of 1e-2" without saying which; both readings have a name here. No privacy budget is claimed:
the update is not clipped.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from gia_bench.defenses.base import Client, Defense, NoiseLaw
from gia_bench.defenses.checks import check
from gia_bench.defenses.draws import laplace, normal
from gia_bench.errors import ConfigError
from gia_bench.values import Batch, Noise, Observation, Params, Shared, State, Update


@final
@dataclass(frozen=True, kw_only=True)
class GaussianNoise(Defense):
    """Adds N(0, sigma^2). Give exactly one of variance (sigma^2) and scale (sigma), in the update's units.

    Compared with by Zhu et al. 2019 (DLG, section 5).
    """

    variance: float | None = None
    scale: float | None = None

    def __post_init__(self) -> None:
        _check("gaussian_noise", self.variance, self.scale)

    @property
    def sigma(self) -> float:
        """The standard deviation."""
        return math.sqrt(self.variance) if self.variance is not None else float(self.scale or 0)

    def noise_law(self, observation: Observation | None = None) -> NoiseLaw | None:
        """Gaussian; of the mean of K clients with sigma / sqrt(K). None for sigma = 0."""
        return Gaussian(self.sigma / math.sqrt(averaged(observation))) if self.sigma else None

    def draw(self, like: Params, batch: Batch, generator: torch.Generator) -> Noise:
        """Standard normal numbers, float32 on the CPU, by parameter name."""
        return normal(like, generator)

    def protect(
        self, update: Update, client: Client, state: State, shared: Shared, noise: Noise
    ) -> tuple[Update, State]:
        """The update plus sigma times the noise."""
        return _noisy(update, noise, self.sigma), state


@final
@dataclass(frozen=True, kw_only=True)
class LaplaceNoise(Defense):
    """Adds Laplace(0, b). Give exactly one of variance (2 b^2) and scale (b), in the update's units.

    Compared with by Zhu et al. 2019 (DLG, section 5).
    """

    variance: float | None = None
    scale: float | None = None

    def __post_init__(self) -> None:
        _check("laplace_noise", self.variance, self.scale)

    @property
    def b(self) -> float:
        """The Laplace distribution's scale."""
        return math.sqrt(self.variance / 2) if self.variance is not None else float(self.scale or 0)

    def noise_law(self, observation: Observation | None = None) -> NoiseLaw | None:
        """Laplace; of the mean of K clients nearly Gaussian, of the same variance. None for b = 0."""
        K = averaged(observation)
        if not self.b:
            return None
        return _Laplace(self.b) if K == 1 else Gaussian(self.b * math.sqrt(2 / K))

    def draw(self, like: Params, batch: Batch, generator: torch.Generator) -> Noise:
        """Laplace(0, 1) numbers, float32 on the CPU, by parameter name."""
        return laplace(like, generator)

    def protect(
        self, update: Update, client: Client, state: State, shared: Shared, noise: Noise
    ) -> tuple[Update, State]:
        """The update plus b times the noise."""
        return _noisy(update, noise, self.b), state


@final
@dataclass(frozen=True)
class Gaussian:
    """N(0, sigma^2) on every entry."""

    sigma: float

    def surprise(self, dummy: Update, observed: Update) -> Tensor:
        """Squared differences / (2 sigma^2)."""
        squares = [(dummy[k] - o).square().sum() for k, o in observed.items()]
        return torch.stack(squares).sum() / (2 * self.sigma**2)


@final
@dataclass(frozen=True)
class _Laplace:
    b: float

    def surprise(self, dummy: Update, observed: Update) -> Tensor:
        """Differences / b."""
        return torch.stack([(dummy[k] - o).abs().sum() for k, o in observed.items()]).sum() / self.b


def averaged(observation: Observation | None) -> int:
    """Over how many clients' noise the observed update is the mean; equally weighted, since weights are not shown."""
    return 1 if observation is None else observation.num_clients


def _noisy(update: Update, noise: Noise, scale: float) -> Update:
    return {name: u.add(noise[name].to(u.device, u.dtype), alpha=scale) for name, u in update.items()}


def _check(name: str, variance: float | None, scale: float | None) -> None:
    if (variance is None) == (scale is None):
        raise ConfigError(
            f"defense {name}: give exactly one of variance and scale, got variance={variance} and scale={scale}; "
            "set the other to null."
        )
    key, given = ("scale", scale) if variance is None else ("variance", variance)
    check(f"defense {name}: {key}", given, lambda v: 0 <= v < math.inf, "be finite and at least 0")
