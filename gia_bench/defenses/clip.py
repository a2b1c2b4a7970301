"""Clipping: an update is shortened to a given length where it is longer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch

from gia_bench.defenses.base import Client, Defense
from gia_bench.defenses.checks import check
from gia_bench.errors import ConfigError, choices
from gia_bench.values import Noise, Observation, Shared, State, Update

NORMS = (1, 2)


@final
@dataclass(frozen=True, kw_only=True)
class ClipUpdate(Defense):
    """update * min(1, max_norm / ||update||), one norm over all tensors together.

    max_norm: in the update's units, > 0; norm: 2 (Euclidean) or 1 (sum of magnitudes). Compared with by Li et al. 2022
    (GGL) at 4. Followed by Gaussian noise in a ``Chain`` it is the client-level Gaussian mechanism (Geyer et al. 2017):
    one client changes the sum of the updates by at most max_norm; the noise's multiplier is its scale / max_norm.
    """

    max_norm: float = 4.0
    norm: int = 2

    def __post_init__(self) -> None:
        check("defense clip: max_norm", self.max_norm, lambda c: 0 < c < math.inf, "be finite and above 0")
        if self.norm not in NORMS:
            raise ConfigError(choices("defense clip: norm", self.norm, NORMS))

    def protect(
        self, update: Update, client: Client, state: State, shared: Shared, noise: Noise
    ) -> tuple[Update, State]:
        """The shortened update. NaN and infinity stay in it, so that the server sees them."""
        return clipped(update, self.max_norm, self.norm), state

    def surrogate(self, update: Update, observation: Observation) -> Update:
        """The same clipping: it is differentiable, and a dummy longer than max_norm gets the observed length."""
        return clipped(update, self.max_norm, self.norm)


def clipped(update: Update, max_norm: float, norm: int = 2) -> Update:
    """``update`` with a joint norm of at most ``max_norm``, up to rounding."""
    # in double: there the order of a sum, which is another one under vmap, does not show in single precision
    powers = [u.abs().sum(dtype=torch.float64) if norm == 1 else u.double().square().sum() for u in update.values()]
    length = torch.stack(powers).sum()
    inside = length <= max_norm**norm
    # the inner where keeps a zero update's gradient finite
    root = torch.where(inside, 1.0, length).pow(1 / norm)
    factor = torch.where(inside, 1.0, max_norm / root)
    factors = {dtype: factor.to(dtype) for dtype in {u.dtype for u in update.values()}}
    return {name: u * factors[u.dtype] for name, u in update.items()}
