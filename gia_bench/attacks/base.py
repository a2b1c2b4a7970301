"""What an attack is: from observations to reconstructions, with nothing private in reach."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, final

from torch import nn

from gia_bench.models.functional import Victim
from gia_bench.threat import Knowledge, Power
from gia_bench.values import Observation, Reconstruction


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
    def max_examples(self) -> int | None:
        """The most examples an update may hold for this attack; None: any number."""
        return None

    def check_victim(self, victim: Victim) -> None:  # noqa: B027 (most have nothing to ask)
        """Raises ``IncompatibleError`` for a model it cannot attack; asked once, when a run is composed."""

    def implant(self, model: nn.Module) -> nn.Module:
        """The model a malicious server sends at the attacked rounds; the honest one by default."""
        return model

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
        does not depend on who else is attacked with it. A victim that diverges gets a ``failure``; others go on.
        """

    @final
    def reconstruct(self, observation: Observation, victim: Victim, *, seed: int = 0) -> Reconstruction:
        """``reconstruct_many`` for a single observation."""
        return self.reconstruct_many([observation], victim, seeds=[seed])[0]
