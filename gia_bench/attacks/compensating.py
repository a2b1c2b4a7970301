"""An attacker who first takes out what the defense put in, and then attacks what is left as if it were plain."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from gia_bench.attacks.base import FORGET, Attack, Broadcast, Snapshots
from gia_bench.errors import IncompatibleError
from gia_bench.models.functional import Victim
from gia_bench.threat import Knowledge, Power
from gia_bench.values import Examples, Observation, Reconstruction


@final
@dataclass(frozen=True, kw_only=True)
class Compensating(Attack):
    """``attack`` on an update to which the server's own compensation was applied as if it were a round's mean, of
    the clients behind it (m = 1 for a single one).

    So Wang et al. 2022 (GradDefense, table III [E]) abuse the compensation against the client whom it should serve.
    The inner attack does not see the defense: ``surrogate`` would treat the update a second time. A defense without
    anything to undo leaves the plain attack.
    """

    attack: Attack

    @property
    def requires(self) -> Knowledge:
        """The inner attack's, the defense and its announcement."""
        return self.attack.requires | Knowledge.DEFENSE | Knowledge.SHARED

    @property
    def needs(self) -> Power:
        """The inner attack's."""
        return self.attack.needs

    @property
    def personal(self) -> bool:
        """The inner attack's."""
        return self.attack.personal

    @property
    def remembers(self) -> bool:
        """Whether the inner attack does."""
        return self.attack.remembers

    @property
    def max_examples(self) -> int | None:
        """The inner attack's."""
        return self.attack.max_examples

    def check_victim(self, victim: Victim) -> None:
        """The inner attack's."""
        self.attack.check_victim(victim)

    @property
    def max_local_steps(self) -> int | None:
        """The inner attack's."""
        return self.attack.max_local_steps

    def tamper(self, honest: Broadcast, *, seed: int, public: Examples | None = None) -> Broadcast:
        """The inner attack's."""
        return self.attack.tamper(honest, seed=seed, public=public)

    def tamper_for(
        self, honest: Broadcast, place: int, num_clients: int, *, seed: int, public: Examples | None = None
    ) -> Broadcast:
        """The inner attack's."""
        return self.attack.tamper_for(honest, place, num_clients, seed=seed, public=public)

    def reconstruct_many(
        self,
        observations: Sequence[Observation],
        victim: Victim,
        *,
        seeds: Sequence[int],
        snapshots: Snapshots = FORGET,
    ) -> list[Reconstruction]:
        plain = [_restored(o) for o in observations]
        return self.attack.reconstruct_many(plain, victim, seeds=seeds, snapshots=snapshots)


def _restored(observation: Observation) -> Observation:
    defense = observation.defense
    if defense is None:
        raise IncompatibleError("An attacker who compensates must know the defense; take threat=adaptive_labels.")
    update = defense.restore(observation.update, observation)
    earlier = tuple(map(_restored, observation.earlier))
    return dataclasses.replace(observation, update=update, earlier=earlier, shared={}, defense=None)
