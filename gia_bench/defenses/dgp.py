"""Dual gradient pruning: neither the largest entries are sent nor the smallest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor

from gia_bench.defenses.feedback import Select
from gia_bench.defenses.selection import Mask, band, check_band, exact, violation
from gia_bench.defenses.withholding import Withholding
from gia_bench.values import Noise, Observation, Shared, Update


@final
@dataclass(frozen=True, kw_only=True)
class DGP(Withholding):
    """Drops the share k1 of the largest entries and the share k2 of the smallest (Xue et al., AAAI 2024, algorithm 1).

    k1, k2: shares in [0, 1) with k1 + k2 < 1; scope: "tensor" (each by itself, as the authors' code) or "global".
    Of n entries the floor(k1 n) largest are dropped and the next n - floor((k1 + k2) n) are sent; ranks and ties as in
    ``selection``. At 5 % / 75 % that is one entry of every tensor of n = 1..5 (the largest: floor(k1 n) is 0 below
    n = 20), where the authors' code sends floor(n / 5), so nothing of a tensor with fewer than 5 entries, ever. On
    larger tensors the two differ by at most one entry. Zeros that are selected stay zeros.
    """

    k1: float = 0.05
    k2: float = 0.75
    scope: str = "tensor"

    def __post_init__(self) -> None:
        check_band("dgp", self.k1, self.k2, self.scope)

    def choice(self, shared: Shared, noise: Noise) -> Select:
        """``select``."""
        return self.select

    def select(self, update: Update) -> Mask:
        """True where an entry is sent."""
        return band(update, exact(self.k1), exact(self.k2), self.scope)

    def violation(self, update: Update, observation: Observation) -> Tensor:
        """Missing entries lie above the largest sent one or below the smallest: exact without a residual, which takes
        part in the ranks and which nobody else sees."""
        return violation(update, observation.update, exact(self.k1), self.scope)
