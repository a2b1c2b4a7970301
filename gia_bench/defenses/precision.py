"""Fewer bits for every entry: half precision, and 8-bit whole numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch

from gia_bench.defenses.base import Client, Defense, NoiseLaw
from gia_bench.defenses.draws import uniform
from gia_bench.defenses.grid import ByChance, on_grid, straight_through
from gia_bench.defenses.noise import averaged
from gia_bench.defenses.selection import check_scope
from gia_bench.errors import ConfigError, choices
from gia_bench.values import Batch, Noise, Observation, Params, Shared, State, Update
from gia_bench.wire import Cast, Codec, Codes, Narrow

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
ROUNDINGS = ("nearest", "stochastic")
INT8_LEVELS = 127


@final
@dataclass(frozen=True, kw_only=True)
class HalfPrecision(Defense):
    """Every entry rounded to the nearest float16 or bfloat16; two bytes per entry travel.

    Compared with by Zhu et al. 2019 (DLG, section 5), who find that it does not stop the attack. float16 turns
    magnitudes above 65,504 into infinity, which the server refuses as it refuses any infinity.
    """

    dtype: str = "float16"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(choices("defense half_precision: dtype", self.dtype, DTYPES))

    @property
    def codec(self) -> Codec:
        """The half-precision numbers themselves."""
        return Narrow(Cast(DTYPES[self.dtype]))

    def protect(
        self, update: Update, client: Client, state: State, shared: Shared, noise: Noise
    ) -> tuple[Update, State]:
        """The rounded update, in its own dtype."""
        return self._rounded(update), state

    def surrogate(self, update: Update, observation: Observation) -> Update:
        """The rounded dummy update, with the gradient of the one that is not."""
        return straight_through(update, self._rounded)

    def _rounded(self, update: Update) -> Update:
        return {name: u.to(DTYPES[self.dtype]).to(u.dtype) for name, u in update.items()}


@final
@dataclass(frozen=True, kw_only=True)
class Int8(Defense):
    """Entries rounded to whole multiples, -127 to 127, of the largest magnitude / 127; a byte each and the unit travel.

    rounding: "nearest" (ties to even) or "stochastic" (up or down by chance, the update in expectation); scope: the
    largest magnitude of each tensor, or of all ("global"). Compared with by Zhu et al. 2019 (DLG, section 5), who do
    not say how they round; symmetric and per tensor is a gia_bench choice. The unit is that of ``grid.unit_above``.
    """

    rounding: str = "nearest"
    scope: str = "tensor"

    def __post_init__(self) -> None:
        if self.rounding not in ROUNDINGS:
            raise ConfigError(choices("defense int8: rounding", self.rounding, ROUNDINGS))
        check_scope("int8", self.scope)

    @property
    def codec(self) -> Codec:
        """One byte per entry, and each tensor's unit."""
        return Narrow(Codes(INT8_LEVELS))

    def draw(self, like: Params, batch: Batch, generator: torch.Generator) -> Noise:
        """Stochastic rounding's uniform numbers in [0, 1), float32 on the CPU, by parameter name; else nothing."""
        return uniform(like, generator) if self.rounding == "stochastic" else {}

    @property
    def adds_noise(self) -> bool:
        """No: what was rounded may still be clipped."""
        return False

    def noise_law(self, observation: Observation | None = None) -> NoiseLaw | None:
        """That of stochastic rounding; of a mean over clients, and of rounding to the nearest, none."""
        by_chance = self.rounding == "stochastic" and averaged(observation) == 1
        return ByChance(INT8_LEVELS, shared=self.scope == "global") if by_chance else None

    def protect(
        self, update: Update, client: Client, state: State, shared: Shared, noise: Noise
    ) -> tuple[Update, State]:
        """The rounded update, in its own dtype."""
        return self._rounded(update, noise), state

    def surrogate(self, update: Update, observation: Observation) -> Update:
        """The dummy update rounded to its nearest multiples, with the gradient of the one that is not; rounded by
        chance it is in the mean what it was."""
        return update if self.rounding == "stochastic" else straight_through(update, lambda u: self._rounded(u, {}))

    def _rounded(self, update: Update, noise: Noise) -> Update:
        # empty tensors have no largest entry
        largest = torch.stack([u.abs().amax() if u.numel() else u.new_zeros(()) for u in update.values()])
        if self.scope == "global":
            largest = largest.amax().expand_as(largest)
        return on_grid(update, largest / INT8_LEVELS, INT8_LEVELS, noise)
