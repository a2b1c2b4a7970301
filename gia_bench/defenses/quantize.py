"""Compressors with a few levels: QSGD and signSGD."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch

from gia_bench.defenses.base import Client, Defense, NoiseLaw
from gia_bench.defenses.checks import check
from gia_bench.defenses.draws import uniform
from gia_bench.defenses.grid import ByChance, on_grid, straight_through
from gia_bench.defenses.noise import averaged
from gia_bench.errors import ConfigError, choices
from gia_bench.values import Batch, Noise, Observation, Params, Shared, State, Update
from gia_bench.wire import Codec, Codes, Narrow, Signs

SCALES = ("mean_abs", "none")


@final
@dataclass(frozen=True, kw_only=True)
class QSGD(Defense):
    """Stochastic rounding to multiples of ||tensor||_2 / levels (Alistarh et al. 2017, section 3.1): unbiased.

    levels: the paper's s, 1 to 127; an entry travels in ceil(log2(2 levels + 1)) bits (the paper's Elias code is not
    used), and each tensor's unit beside them. One bucket per tensor is a gia_bench choice; the unit is that of
    ``grid.unit_above``. The attacker's surrogate is the update itself, which it is in the mean, and chance has its law.
    """

    levels: int = 7

    def __post_init__(self) -> None:
        check("defense qsgd: levels", self.levels, lambda s: s in range(1, 128), "be a whole number from 1 to 127")

    @property
    def codec(self) -> Codec:
        """Packed levels, and each tensor's unit."""
        return Narrow(Codes(int(self.levels)))

    def draw(self, like: Params, batch: Batch, generator: torch.Generator) -> Noise:
        """Uniform numbers in [0, 1), float32 on the CPU, by parameter name."""
        return uniform(like, generator)

    @property
    def adds_noise(self) -> bool:
        """No: what was rounded may still be clipped."""
        return False

    def noise_law(self, observation: Observation | None = None) -> NoiseLaw | None:
        """That of stochastic rounding; of a mean over clients, none."""
        return ByChance() if averaged(observation) == 1 else None

    def protect(
        self, update: Update, client: Client, state: State, shared: Shared, noise: Noise
    ) -> tuple[Update, State]:
        """The rounded update, in its own dtype."""
        # in double: there the order of a sum does not show in single precision
        lengths = torch.stack([torch.linalg.vector_norm(u, dtype=torch.float64) for u in update.values()])
        return on_grid(update, lengths / self.levels, int(self.levels), noise), state


@final
@dataclass(frozen=True, kw_only=True)
class SignSGD(Defense):
    """Signs only: a bit per entry.

    scale: "mean_abs" multiplies by the tensor's mean magnitude (Karimireddy et al. 2019, section 5: layer-wise),
    "none" sends +1 and -1 (Bernstein et al. 2018). 0 counts as positive, which is a gia_bench choice: a third value
    would cost a second bit. The server takes the mean, as of any update; Bernstein's majority vote is not offered.
    """

    scale: str = "mean_abs"

    def __post_init__(self) -> None:
        if self.scale not in SCALES:
            raise ConfigError(choices("defense sign_sgd: scale", self.scale, SCALES))

    @property
    def codec(self) -> Codec:
        """Sign bits, and each tensor's magnitude."""
        return Narrow(Signs())

    def protect(
        self, update: Update, client: Client, state: State, shared: Shared, noise: Noise
    ) -> tuple[Update, State]:
        """Plus or minus the magnitude; a tensor with NaN or infinity is NaN as a whole, so that the server sees it."""
        return self._signs(update), state

    def surrogate(self, update: Update, observation: Observation) -> Update:
        """The signs of the dummy update, with the gradient of the update itself."""
        return straight_through(update, self._signs)

    def _signs(self, update: Update) -> Update:
        # in double: there the order of a sum does not show in single precision
        sums = torch.stack([u.abs().sum(dtype=torch.float64) for u in update.values()])
        means = sums / sums.new_tensor([max(u.numel(), 1) for u in update.values()])
        sizes = torch.where(means.isfinite(), means if self.scale == "mean_abs" else 1.0, torch.nan)
        # adding 0 turns -0.0 into 0.0
        return {k: size.to(u.dtype).copysign(u + 0.0) for size, (k, u) in zip(sizes, update.items(), strict=True)}
