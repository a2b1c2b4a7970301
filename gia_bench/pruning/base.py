"""What a pruning method is: the first masks, and for some what clients tell so that the server can change them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from gia_bench.defenses.selection import Mask
from gia_bench.models.functional import Victim
from gia_bench.values import Batch, Examples, Params, State, Update

if TYPE_CHECKING:
    from gia_bench.federated.work import LocalWork


class Trained(NamedTuple):
    """What a client holds after its local work. params: the broadcast; update: on the masks, before protection;
    masks: of every prunable parameter, as announced; seen: what ``witness`` gathered; state: the method's own.
    """

    params: Params
    update: Update
    masks: Mask
    seen: State
    state: State


class Testimony(NamedTuple):
    """What a client makes of it: the update that goes on to the defense, its evidence by parameter, its next state.

    Evidence of dtype bool is the client's own mask: its update is cut to it before it is sent.
    """

    update: Update
    evidence: dict[str, Tensor]
    state: State


class Begun(NamedTuple):
    """Before round 0. masks: of all prunable parameters; params: the weights that the federation starts from where a
    method has trained them, empty where they are the published ones."""

    masks: Mask
    params: Params


class Pruning(ABC):
    """Hyperparameters are fields of a frozen dataclass. True in a mask means that the weight is kept.

    ``witness`` and ``testify`` run on a client, under ``vmap``: pure, and without control flow on its tensors.
    """

    @abstractmethod
    def start(self, victim: Victim, public: Examples) -> Mask:
        """The masks of all prunable parameters before round 0; asked once. ``public``: no client holds them."""

    def begin(self, victim: Victim, public: Examples) -> Begun:
        """What the federation starts from: ``start``, and weights where the method changes them."""
        return Begun(self.start(victim, public), {})

    def check_local(self, local: LocalWork) -> None:  # noqa: B027 (most have nothing to ask)
        """Raises ``IncompatibleError`` for local work it cannot go with."""

    def check_public(self, split: str) -> None:  # noqa: B027 (most train nothing on it)
        """Raises ``IncompatibleError`` for public examples from a split that it cannot train weights on."""

    def strength(self, round_index: int) -> float | None:
        """How much the masks may change after this round; None where they stay as they are."""
        return None

    def watches(self, strength: float | None) -> bool:
        """Whether clients look at their gradients in a round of this ``strength``."""
        return strength is not None

    def remember(self, like: Params) -> State:
        """A client's own state before its first round."""
        return {}

    def witness(self, seen: State, gradient: Update, batch: Batch) -> State:
        """What was seen, after one more local step: ``gradient`` is of all weights, the pruned ones too."""
        return seen

    def asks(self, like: Params, masks: Mask) -> dict[str, Tensor]:
        """Names, shapes and dtypes of the evidence of a round after which the masks change."""
        return {}

    def testify(self, trained: Trained, strength: float | None) -> Testimony:
        """A client's evidence (only where there is a ``strength``) and next state."""
        return Testimony(trained.update, {}, trained.state)

    def combine(self, aggregate: Update, evidence: dict[str, Tensor]) -> Update:
        """The mean update of all clients in the light of their mean evidence."""
        return aggregate

    def judge(self, victim: Victim, aggregate: Update) -> dict[str, Tensor]:
        """Evidence that the server finds by itself, in a round after which the masks change: in the mean update, as
        ``combine`` left it, and the first weights, which are the victim's."""
        return {}

    def adjust(self, params: Params, masks: Mask, evidence: dict[str, Tensor], strength: float) -> Mask:
        """The next masks, from the server's weights after its step, the clients' mean evidence, and its own."""
        return masks
