"""What a defense is: named stages of a client's and a server's round, each with a do-nothing default but one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from gia_bench.values import Batch, Buffers, Examples, Noise, Observation, Params, Shared, State, Update
from gia_bench.wire import DENSE, Codec

if TYPE_CHECKING:
    from gia_bench.federated.work import LocalWork
    from gia_bench.models.functional import Victim

AskClient: TypeAlias = Callable[[int], tuple[Update, State]]
"""(position in the cohort) -> that client's own update and state, before protection; for a leader's announcement."""


class BatchLoss(Protocol):
    """(params, batch [B, ...]) -> (mean loss, buffers after the pass). ``replaced``: buffers, by name, that stand in
    the place of the client's in this pass only (PRECODE's noise); afterwards his own are back."""

    def __call__(self, params: Params, batch: Batch, replaced: Buffers | None = None, /) -> tuple[Tensor, Buffers]: ...


class Client(NamedTuple):
    """What one client holds while it protects its update. ``params``: what its local work started from
    (``Defense.start``); ``batch`` is [S, B, ...], as transformed; ``seen``: what its local gradients noted
    (``Defense.seen``); ``learning_rate``: of its local steps, None where its update is a gradient."""

    victim: Victim
    params: Params
    buffers: Buffers
    batch: Batch
    seen: State = {}  # noqa: RUF012 (a NamedTuple's default; never written to)
    learning_rate: float | None = None


class NoiseLaw(Protocol):
    """What chance does to every entry of an update; its law is public, and what it did is not."""

    def surprise(self, dummy: Update, observed: Update) -> Tensor:
        """Minus the log density of ``observed`` where ``dummy`` was to be sent, in nats, up to a constant: a scalar, 0
        where they agree. Differentiable in ``dummy``; runs under ``vmap``."""
        ...


class Defense(ABC):
    """Hyperparameters are fields of a frozen dataclass; state is an argument and a return value.

    Everything that runs on a client (``transform``, ``gradient``, ``protect``) is pure and runs under ``vmap``:
    no data-dependent Python control flow, no in-place changes of arguments, no random numbers but ``noise``.
    """

    @property
    def codec(self) -> Codec:
        """How this defense's updates are packed. Must be lossless on whatever ``protect`` returns."""
        return DENSE

    @property
    def model_codec(self) -> Codec:
        """How the server's model is packed for a client that downloads all of it."""
        return DENSE

    def leaves(self) -> tuple[Defense, ...]:
        """The defenses it is made of, in their order, however deep; itself where it is one."""
        return (self,)

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

    def check_steps(self, sizes: Collection[int]) -> None:  # noqa: B027 (most have nothing to ask)
        """Raises ``IncompatibleError`` for local steps that it cannot protect; asked once, when a run is composed.
        ``sizes``: every number of examples that a local step of some client has."""

    def remark(self, local: LocalWork) -> str | None:
        """A sentence for the user where this local work is not what its paper protects; asked when a run begins."""
        return None

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

    def informed(self, shared: Shared) -> Defense:
        """What computes one client's local gradients once ``shared`` is announced: itself, unless they depend on it."""
        return self

    @property
    def asks_a_leader(self) -> bool:
        """Whether it announces what one client would send, before any protection (ADGP)."""
        return False

    @property
    def own_gradients(self) -> bool:
        """Whether it computes the local gradients in a way of its own."""
        return type(self).gradient is not Defense.gradient

    def seen(self) -> State:
        """What this object, as ``informed`` made it, noted while it computed one client's gradients."""
        return {}

    def asks(self, like: Params, shared: Shared) -> dict[str, Tensor]:
        """Evidence that ``protect`` adds to the update this round, of these names, shapes and dtypes. The server hands
        its weighted mean (of booleans: the share that is true) to ``compensate`` with that of the updates.
        """
        return {}

    def draw(self, like: Params, batch: Batch, generator: torch.Generator) -> Noise:
        """All random numbers of one client in one round; called outside ``vmap``. ``batch``: [S, B, ...]."""
        return {}

    def transform(self, batch: Batch, noise: Noise) -> Batch:
        """The examples that are trained on instead of the private ones (ATS, MixUp, InstaHide)."""
        return batch

    def start(self, client: Client, state: State, shared: Shared) -> Params:
        """The weights that a client's local work starts from, and its update is a change of: the broadcast, which is
        ``client.params``, unless something of its own stayed with the client (PriPrune). Nothing is announced yet
        when a leader is asked. Runs on a client, like ``protect``."""
        return client.params

    def gradient(
        self, loss: BatchLoss, params: Params, batch: Batch, noise: Noise, step: int
    ) -> tuple[Update, Buffers, Tensor]:
        """The gradient of one local step, the buffers after it, and the mean loss (DP-SGD clips per example here). Both
        are means: sums over the examples that the step really holds, or over 1 where it holds none."""
        gradient, (value, buffers) = torch.func.grad(_with_value(loss), has_aux=True)(params, batch)
        return gradient, buffers, value

    @abstractmethod
    def protect(
        self, update: Update, client: Client, state: State, shared: Shared, noise: Noise
    ) -> tuple[Update, State]:
        """What the client sends instead of ``update``, and its next state. All loss of information happens here."""

    def compensate(
        self, aggregate: Update, server_state: State, shared: Shared, shares: Sequence[float]
    ) -> tuple[Update, State]:
        """The server's use of the weighted mean, once a round. shares: the weights of the clients that are in it, which
        add up to 1."""
        return aggregate, server_state

    def settle(self, params: Params, server_state: State) -> tuple[Params, State]:
        """The server's model after the optimizer's step: of pruned learning, where its weights go to zero."""
        return params, server_state

    def rehearse(
        self,
        victim: Victim,
        local: LocalWork,
        params: Params,
        buffers: Buffers,
        batch: Batch,
        shared: Shared,
        noise: Noise,
        counts: Sequence[int] | None,
    ) -> Update:
        """What a client with this batch [S, B, ...] that is new to the defense would send, evidence left out: for
        attackers who know the defense and simulate clients. Pure; runs under ``vmap`` like the stages it plays."""
        own, state, informed = self.transform(batch, noise), self.init_client(params), self.informed(shared)
        client = Client(victim, params, buffers, own, learning_rate=local.learning_rate)
        client = client._replace(params=self.start(client, state, shared))
        update = local.run(victim, informed, client.params, buffers, own, noise, counts).update
        sent, _ = self.protect(update, client._replace(seen=informed.seen()), state, shared, noise)
        return {k: sent[k] for k in params}

    def surrogate(self, update: Update, observation: Observation) -> Update:
        """A differentiable stand-in for ``protect``, for attackers who know the defense: applied to dummy updates."""
        return update

    def violation(self, update: Update, observation: Observation) -> Tensor:
        """How far an update is from the nearest one of which the same entries would have been withheld as from the one
        observed: squared, differentiable, a scalar; 0 where what is missing says nothing. For attackers who know the
        defense; ``update`` is a dummy, before any protection.
        """
        return next(iter(update.values())).new_zeros(())

    @property
    def repays(self) -> bool:
        """Whether an entry that is sent, if any is not zero, carries all that was withheld of it in earlier rounds: the
        sum of what was sent until then is there the sum of the updates themselves."""
        return False

    @property
    def adds_noise(self) -> bool:
        """Whether it adds noise, be its law known or not."""
        return self.noise_law() is not None

    def noise_law(self, observation: Observation | None = None) -> NoiseLaw | None:
        """The law of what chance does to what is sent (noise, rounding), for attackers who know the defense; None: it
        does nothing, or another stage changes it, or the law depends on an observation, and this one (None: none yet)
        does not show enough."""
        return None

    def restore(self, update: Update, observation: Observation) -> Update:
        """One client's observed update without what the server can take out of it by itself (its compensation), for
        attackers who do that before they attack. Called outside ``vmap``."""
        return update

    def measure(self, state: State) -> dict[str, Tensor]:
        """Scalars worth recording about one client's state, by metric name."""
        return {}


def _with_value(loss: BatchLoss) -> Callable[[Params, Batch], tuple[Tensor, tuple[Tensor, Buffers]]]:
    def value_twice(params: Params, batch: Batch) -> tuple[Tensor, tuple[Tensor, Buffers]]:
        value, buffers = loss(params, batch)
        return value, (value, buffers)

    return value_twice
