"""What all defenses have in common that send some entries as they are and withhold the others."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field

from torch import Tensor

from gia_bench.defenses.base import Client, Defense
from gia_bench.defenses.feedback import ErrorFeedback, Select
from gia_bench.defenses.selection import on_support, restricted
from gia_bench.values import Noise, Observation, Params, Shared, State, Update
from gia_bench.wire import ALIGNED, SPARSE, Codec
from gia_bench.wire.aligned import MASK


@dataclass(frozen=True, kw_only=True)
class Withholding(Defense):
    """Sends the entries of the update with its residual that ``choice`` selects. Subclasses choose.

    error_feedback: what becomes of the entries that are not sent.
    """

    error_feedback: ErrorFeedback = field(default_factory=ErrorFeedback)

    @property
    def codec(self) -> Codec:
        """Values and their positions; values only where a leader announces the positions."""
        return ALIGNED if self.asks_a_leader else SPARSE

    def init_client(self, like: Params) -> State:
        """An empty residual."""
        return self.error_feedback.initial(like)

    @abstractmethod
    def choice(self, shared: Shared, noise: Noise) -> Select:
        """How entries are selected: by their own magnitudes, by what was announced, or by what was drawn."""

    def protect(
        self, update: Update, client: Client, state: State, shared: Shared, noise: Noise
    ) -> tuple[Update, State]:
        """The selected entries of the update with its residual."""
        return self.error_feedback.send(update, state, self.choice(shared, noise))

    def surrogate(self, update: Update, observation: Observation) -> Update:
        """The dummy update on a leader's announced mask; without one, or where it is hidden, where the observed update
        is not zero."""
        if self.asks_a_leader and observation.shared:
            return restricted(update, {name: observation.shared[MASK + name] for name in update})
        return on_support(update, observation.update)

    @property
    def repays(self) -> bool:
        """As its error feedback does."""
        return self.error_feedback.repays

    def measure(self, state: State) -> dict[str, Tensor]:
        """``residual_norm`` and ``never_sent_share``."""
        return self.error_feedback.measure(state)
