"""Noise taken out of an update by random-matrix theory: GradDefense's compensation on the server."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from gia_bench.defenses.checks import check
from gia_bench.errors import ConfigError, choices
from gia_bench.rows import cut, joined
from gia_bench.values import Update

VARIANCES: Mapping[str, Callable[[float, Sequence[float]], float]] = {
    "paper": lambda variance, shares: len(shares) * variance * sum(shares),
    "exact": lambda variance, shares: variance * sum(share**2 for share in shares),
}
"""(variance of one client's entries, the m clients' weights epsilon_i in the mean) -> what the mean's entries are taken
to have. It is (d/s) sigma^2 sum(epsilon_i^2); the paper's m (d/s) sigma^2 sum(epsilon_i) is that of the sum of equally
weighted clients, m^2 times more."""
SCOPES = ("global", "layer")


@final
@dataclass(frozen=True, kw_only=True)
class RandomMatrix:
    """Keeps what a matrix of independent noise would not have (Wang et al. 2022, GradDefense, equation 4).

    The update is laid row by row in a matrix C [v, w]. The covariance of noise alone would have its eigenvalues within
    the Marchenko-Pastur band, so C is projected on the eigenvectors whose eigenvalues lie outside. The columns are
    centred for the covariance and not for the projection, as in the released code.

    q: v / w wanted, at least 1. pad: zeros fill the matrix up, v = ceil(sqrt(q N)) for N entries; otherwise, as in the
    released code, v is the smallest factor of N that is at least sqrt(q N), and v / w can be thousands. scope:
    "global", or "layer" for a matrix per tensor. variance: of the noise, a name in ``VARIANCES``. With "paper" the band
    lies m^2 times too high: noise falls below it and is kept, and signal inside is lost.
    """

    q: float = 6.0
    pad: bool = True
    scope: str = "global"
    variance: str = "paper"

    def __post_init__(self) -> None:
        where = "defense graddefense: compensation."
        check(where + "q", self.q, lambda q: 1 <= q < math.inf, "be finite and at least 1")
        for key, known in (("scope", SCOPES), ("variance", VARIANCES)):
            if getattr(self, key) not in known:
                raise ConfigError(choices(where + key, getattr(self, key), known))

    def denoise(self, update: Update, variance: float, shares: Sequence[float]) -> Update:
        """The mean of updates with these weights, without their noise. variance: of the noise in an entry of one
        client's update, 0 to give the mean back."""
        assumed = VARIANCES[self.variance](variance, shares)
        if self.scope == "layer":
            return {name: self._denoised(u.reshape(-1), assumed).view(u.shape) for name, u in update.items()}
        return cut(self._denoised(joined(update), assumed), update)

    def shape(self, num_entries: int) -> tuple[int, int]:
        """(v, w) of the matrix for so many entries."""
        least = math.sqrt(self.q * num_entries)
        if self.pad:
            v = math.ceil(least)
            return v, math.ceil(num_entries / v)
        small = [f for f in range(1, math.isqrt(num_entries) + 1) if num_entries % f == 0]
        factors = {*small, *(num_entries // f for f in small)}
        v = min((f for f in factors if f >= least), default=num_entries)
        return v, num_entries // v

    def _denoised(self, row: Tensor, variance: float) -> Tensor:
        v, w = self.shape(row.numel())
        if v < 2:  # one number has no covariance
            return row
        matrix = torch.nn.functional.pad(row.double(), (0, v * w - row.numel())).view(v, w)
        eigenvalues, vectors = torch.linalg.eigh(matrix.T.cov().view(w, w))
        low, high = marchenko_pastur(variance, v / w)
        noise = vectors[:, (eigenvalues > low) & (eigenvalues < high)]
        if not noise.numel():
            return row
        projection = torch.eye(w, dtype=noise.dtype, device=noise.device) - noise @ noise.T
        kept: Tensor = matrix.to(row.dtype) @ projection.to(row.dtype)
        return kept.reshape(-1)[: row.numel()]


def marchenko_pastur(variance: float, q: float) -> tuple[float, float]:
    """The band of the eigenvalues of the covariance of v x w independent numbers, q = v / w."""
    low, high = (variance * (1 + sign / math.sqrt(q)) ** 2 for sign in (-1, 1))
    return low, high
