"""Top-k: only the largest entries are sent. The control for DGP."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

from torch import Tensor

from gia_bench.defenses.base import Client, Defense
from gia_bench.defenses.checks import check
from gia_bench.defenses.feedback import ErrorFeedback
from gia_bench.defenses.selection import Mask, band, check_scope, exact, on_support, violation
from gia_bench.values import Noise, Observation, Params, Shared, State, Update
from gia_bench.wire import SPARSE, Codec


@final
@dataclass(frozen=True, kw_only=True)
class TopK(Defense):
    """Sends the n - floor((1 - keep) n) entries of largest magnitude (ceil(keep n), at least one per tensor).

    keep: share in (0, 1]; scope: "tensor" (n entries of each) or "global" (of all together). Ranks and ties as in
    ``selection``. keep = 1 - k1 - k2 sends exactly as many entries of every tensor as DGP(k1, k2).
    """

    keep: float = 0.2
    scope: str = "tensor"
    error_feedback: ErrorFeedback = field(default_factory=ErrorFeedback)

    def __post_init__(self) -> None:
        check("defense top_k: keep", self.keep, lambda s: 0 < s <= 1, "lie in (0, 1]; it is a share, 0.2 means 20 %")
        check_scope("top_k", self.scope)

    @property
    def codec(self) -> Codec:
        """Values and their positions."""
        return SPARSE

    def init_client(self, like: Params) -> State:
        """An empty residual."""
        return self.error_feedback.initial(like)

    def select(self, update: Update) -> Mask:
        """True where an entry is sent."""
        return band(update, exact(0), 1 - exact(self.keep), self.scope)

    def protect(
        self, update: Update, client: Client, state: State, shared: Shared, noise: Noise
    ) -> tuple[Update, State]:
        """The largest entries of the update with its residual."""
        return self.error_feedback.send(update, state, self.select)

    def surrogate(self, update: Update, observation: Observation) -> Update:
        """The dummy update where the observed one is not zero."""
        return on_support(update, observation.update)

    def violation(self, update: Update, observation: Observation) -> Tensor:
        """Missing entries lie below the smallest sent one: exact without a residual, which takes part in the ranks and
        which nobody else sees."""
        return violation(update, observation.update, exact(0), self.scope)

    @property
    def repays(self) -> bool:
        """As its error feedback does."""
        return self.error_feedback.repays

    def measure(self, state: State) -> dict[str, Tensor]:
        """``residual_norm`` and ``never_sent_share``."""
        return self.error_feedback.measure(state)
