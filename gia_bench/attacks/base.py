"""What an attack is: from observations to reconstructions, with nothing private in reach."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, final

from gia_bench.models.functional import Victim
from gia_bench.threat import Knowledge, Power
from gia_bench.values import Buffers, Examples, Observation, Params, Reconstruction


class Broadcast(NamedTuple):
    """What a server sends: a model, and the values of its tensors."""

    victim: Victim
    params: Params
    buffers: Buffers


class Snapshots(Protocol):
    """Where a long attack leaves its state while it runs, so that a killed run goes on where it stopped."""

    def load(self, key: str) -> Mapping[str, Any] | None:
        """The newest state under ``key``, or None."""
        ...

    def save(self, key: str, state: Mapping[str, Any]) -> None:
        """Keep ``state`` (tensors and numbers) under ``key``, replacing the older one; often."""
        ...


@final
class Forget:
    """Snapshots for callers that do not resume."""

    def load(self, key: str) -> Mapping[str, Any] | None:
        """Never anything."""
        return None

    def save(self, key: str, state: Mapping[str, Any]) -> None:
        """Keeps nothing."""


FORGET = Forget()


@final
@dataclass(frozen=True)
class Apart:
    """``inner`` for one of several attacks that share it: equal settings and victims must not meet under one key."""

    inner: Snapshots
    name: str

    def load(self, key: str) -> Mapping[str, Any] | None:
        """Its own newest state."""
        return self.inner.load(f"{self.name}-{key}")

    def save(self, key: str, state: Mapping[str, Any]) -> None:
        """Kept under its own name."""
        self.inner.save(f"{self.name}-{key}", state)


class Attack(ABC):
    """Hyperparameters are fields of a frozen dataclass. ``requires`` and ``needs`` are checked before anything runs."""

    @property
    @abstractmethod
    def requires(self) -> Knowledge:
        """What the observation must show."""

    @property
    def needs(self) -> Power:
        """What the server must be able to change."""
        return Power.NONE

    @property
    def personal(self) -> bool:
        """Whether a malicious server sends each client values of its own (``tamper_for``), in one common module."""
        return False

    @property
    def remembers(self) -> bool:
        """Whether it wants ``Observation.earlier``: what was seen of the client in earlier attacked rounds."""
        return False

    @property
    def max_examples(self) -> int | None:
        """The most examples an update may hold for this attack; None: any number."""
        return None

    @property
    def max_local_steps(self) -> int | None:
        """The most local steps an update may stand for; None: any number."""
        return None

    def check_victim(self, victim: Victim) -> None:  # noqa: B027 (most have nothing to ask)
        """Raises ``IncompatibleError`` for a model it cannot attack; asked once, when a run is composed."""

    def tamper(self, honest: Broadcast, *, seed: int, public: Examples | None = None) -> Broadcast:
        """What a malicious server sends to the observed clients of an attacked round; the honest broadcast by default.

        The honest round is played as always, and training goes on with it: the malicious one is played beside it, with
        the same clients, batches, random numbers and residuals, and its mean is thrown away. ``CHANGE_PARAMS`` allows
        other values under the same names, ``CHANGE_MODEL`` another module too (``models.imprint.in_front``), whose
        tensors by the honest names stay theirs. ``reconstruct_many`` then gets the victim and the observations of that
        round. seed: names the attack and the round; public: examples that no client holds, where the threat shows them.
        """
        return honest

    def tamper_for(
        self, honest: Broadcast, place: int, num_clients: int, *, seed: int, public: Examples | None = None
    ) -> Broadcast:
        """What the client at ``place`` (0 to num_clients - 1) of the malicious round gets, where the attack is
        ``personal``. Module, names and shapes are the same for all. An observation of one client holds what that
        client got; one of the sum holds the mean over the clients.
        """
        return self.tamper(honest, seed=seed, public=public)

    @abstractmethod
    def reconstruct_many(
        self,
        observations: Sequence[Observation],
        victim: Victim,
        *,
        seeds: Sequence[int],
        snapshots: Snapshots = FORGET,
    ) -> list[Reconstruction]:
        """One reconstruction per observation, in order. ``seeds``: one per observation, so that a victim's result
        does not depend on who else is attacked with it. A victim whose loss was never finite gets a ``failure``; of one
        that diverged later the best iterate is returned; others go on.
        """

    @final
    def reconstruct(self, observation: Observation, victim: Victim, *, seed: int = 0) -> Reconstruction:
        """``reconstruct_many`` for a single observation."""
        return self.reconstruct_many([observation], victim, seeds=[seed])[0]
