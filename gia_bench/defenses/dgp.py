"""Dual gradient pruning: neither the largest entries are sent nor the smallest."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

from torch import Tensor

from gia_bench.defenses.base import Client, Defense
from gia_bench.defenses.feedback import ErrorFeedback
from gia_bench.defenses.selection import Mask, band, check_band, exact, on_support, violation
from gia_bench.values import Noise, Observation, Params, Shared, State, Update
from gia_bench.wire import SPARSE, Codec


@final
@dataclass(frozen=True, kw_only=True)
class DGP(Defense):
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
    error_feedback: ErrorFeedback = field(default_factory=ErrorFeedback)

    def __post_init__(self) -> None:
        check_band("dgp", self.k1, self.k2, self.scope)

    @property
    def codec(self) -> Codec:
        """Values and their positions."""
        return SPARSE

    def init_client(self, like: Params) -> State:
        """An empty residual."""
        return self.error_feedback.initial(like)

    def select(self, update: Update) -> Mask:
        """True where an entry is sent."""
        return band(update, exact(self.k1), exact(self.k2), self.scope)

    def protect(
        self, update: Update, client: Client, state: State, shared: Shared, noise: Noise
    ) -> tuple[Update, State]:
        """The middle ranks of the update with its residual."""
        return self.error_feedback.send(update, state, self.select)

    def surrogate(self, update: Update, observation: Observation) -> Update:
        """The dummy update where the observed one is not zero."""
        return on_support(update, observation.update)

    def violation(self, update: Update, observation: Observation) -> Tensor:
        """Missing entries lie above the largest sent one or below the smallest: exact without a residual, which takes
        part in the ranks and which nobody else sees."""
        return violation(update, observation.update, exact(self.k1), self.scope)

    @property
    def repays(self) -> bool:
        """As its error feedback does."""
        return self.error_feedback.repays

    def measure(self, state: State) -> dict[str, Tensor]:
        """``residual_norm`` and ``never_sent_share``."""
        return self.error_feedback.measure(state)
