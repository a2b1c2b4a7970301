"""An attacker who could know the defense and does not use it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from gia_bench.attacks.base import FORGET, Attack, Snapshots
from gia_bench.models.functional import Victim
from gia_bench.threat import Knowledge
from gia_bench.values import Observation, Reconstruction


@final
@dataclass(frozen=True, kw_only=True)
class Oblivious(Attack):
    """``attack`` without the defense's hyperparameters. Knowing them can mislead: a stand-in that is wrong costs more
    than none. Asked only where the threat model shows the defense: elsewhere it would be ``attack`` itself.
    """

    attack: Attack

    @property
    def requires(self) -> Knowledge:
        """The inner attack's, and the defense that it leaves aside."""
        return self.attack.requires | Knowledge.DEFENSE

    @property
    def remembers(self) -> bool:
        """Whether the inner attack does."""
        return self.attack.remembers

    @property
    def max_examples(self) -> int | None:
        """The inner attack's."""
        return self.attack.max_examples

    @property
    def max_local_steps(self) -> int | None:
        """The inner attack's."""
        return self.attack.max_local_steps

    def check_victim(self, victim: Victim) -> None:
        """The inner attack's."""
        self.attack.check_victim(victim)

    def reconstruct_many(
        self,
        observations: Sequence[Observation],
        victim: Victim,
        *,
        seeds: Sequence[int],
        snapshots: Snapshots = FORGET,
    ) -> list[Reconstruction]:
        blind = [dataclasses.replace(o, defense=None) for o in observations]
        return self.attack.reconstruct_many(blind, victim, seeds=seeds, snapshots=snapshots)
