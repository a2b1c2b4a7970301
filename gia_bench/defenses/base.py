"""What a defense is: named stages of a client's and a server's round, each with a do-nothing default but one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from gia_bench.values import Batch, Buffers, Examples, Noise, Observation, Params, Shared, State, Update
from gia_bench.wire import DENSE, Codec

if TYPE_CHECKING:
    from gia_bench.models.functional import Victim

BatchLoss: TypeAlias = Callable[[Params, Batch], tuple[Tensor, Buffers]]
"""(params, batch [B, ...]) -> (mean loss, buffers after the pass)."""
AskClient: TypeAlias = Callable[[int], tuple[Update, State]]
"""(position in the cohort) -> that client's own update and state, before protection; for a leader's announcement."""


class Client(NamedTuple):
    """What one client holds while it protects its update. ``batch`` is [S, B, ...], as transformed."""

    victim: Victim
    params: Params
    buffers: Buffers
    batch: Batch


class Defense(ABC):
    """Hyperparameters are fields of a frozen dataclass; state is an argument and a return value.

    Everything that runs on a client (``transform``, ``gradient``, ``protect``) is pure and runs under ``vmap``:
    no data-dependent Python control flow, no in-place changes of arguments, no random numbers but ``noise``.
    """

    @property
    def codec(self) -> Codec:
        """How this defense's updates are packed. Must be lossless on whatever ``protect`` returns."""
        return DENSE

    def init_client(self, like: Params) -> State:
        """A client's state before its first round (error-feedback residual)."""
        return {}

    def init_server(self, like: Params) -> State:
        """The server's state before the first round."""
        return {}

    def prepare_model(self, model: nn.Module) -> nn.Module:
        """The architecture that is trained; may add layers (PRECODE)."""
        return model

    def check_victim(self, victim: Victim) -> None:  # noqa: B027 (most have nothing to ask)
        """Raises ``IncompatibleError`` for a model it cannot protect; asked once, when a run is composed."""

    def calibrate(self, victim: Victim, public: Examples) -> Defense:
        """The same defense with what it takes from the published model and public examples (GradDefense's root set);
        asked once, when a run is composed. ``public``: examples that no client holds.
        """
        return self

    def announce(
        self,
        like: Params,
        server_state: State,
        round_index: int,
        num_clients: int,
        draw: torch.Generator,
        ask: AskClient,
    ) -> Shared:
        """What the server (or a leader among ``num_clients``) tells every client before they protect."""
        return {}

    def draw(self, like: Params, batch: Batch, generator: torch.Generator) -> Noise:
        """All random numbers of one client in one round; called outside ``vmap``. ``batch``: [S, B, ...]."""
        return {}

    def transform(self, batch: Batch, noise: Noise) -> Batch:
        """The examples that are trained on instead of the private ones (ATS, MixUp, InstaHide)."""
        return batch

    def gradient(
        self, loss: BatchLoss, params: Params, batch: Batch, noise: Noise, step: int
    ) -> tuple[Update, Buffers, Tensor]:
        """The gradient of one local step, the buffers after it, and the mean loss (DP-SGD clips per example here)."""
        gradient, (value, buffers) = torch.func.grad(_with_value(loss), has_aux=True)(params, batch)
        return gradient, buffers, value

    @abstractmethod
    def protect(
        self, update: Update, client: Client, state: State, shared: Shared, noise: Noise
    ) -> tuple[Update, State]:
        """What the client sends instead of ``update``, and its next state. All loss of information happens here."""

    def compensate(self, aggregate: Update, server_state: State, shared: Shared) -> tuple[Update, State]:
        """The server's use of the weighted mean, once a round."""
        return aggregate, server_state

    def settle(self, params: Params, server_state: State) -> tuple[Params, State]:
        """The server's model after the optimizer's step: of pruned learning, where its weights go to zero."""
        return params, server_state

    def surrogate(self, update: Update, observation: Observation) -> Update:
        """A differentiable stand-in for ``protect``, for attackers who know the defense: applied to dummy updates."""
        return update

    def measure(self, state: State) -> dict[str, Tensor]:
        """Scalars worth recording about one client's state, by metric name."""
        return {}


def _with_value(loss: BatchLoss) -> Callable[[Params, Batch], tuple[Tensor, tuple[Tensor, Buffers]]]:
    def value_twice(params: Params, batch: Batch) -> tuple[Tensor, tuple[Tensor, Buffers]]:
        value, buffers = loss(params, batch)
        return value, (value, buffers)

    return value_twice
