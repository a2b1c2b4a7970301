"""A fixed ensemble: no defense is called safe by the one attack that its authors chose."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import final

from gia_bench.attacks.base import FORGET, Apart, Attack, Snapshots
from gia_bench.attacks.evidence import improbability
from gia_bench.errors import ConfigError, IncompatibleError
from gia_bench.models.functional import Victim
from gia_bench.threat import Knowledge
from gia_bench.values import Observation, Reconstruction

log = logging.getLogger(__name__)

_SHOWN: Mapping[Knowledge, Callable[[Observation, Victim], bool]] = {
    Knowledge.BUFFERS: lambda o, victim: bool(o.buffers) or not victim.initial()[1],
    Knowledge.NUM_EXAMPLES: lambda o, _: o.num_examples is not None,
    Knowledge.LABELS: lambda o, _: o.labels is not None,
    Knowledge.LOCAL: lambda o, _: o.local is not None,
    Knowledge.SHARED: lambda o, _: bool(o.shared),
    Knowledge.DEFENSE: lambda o, _: o.defense is not None,
    Knowledge.SENT_BUFFERS: lambda o, _: o.sent_buffers is not None,
    Knowledge.PUBLIC: lambda o, _: o.public is not None,
}
"""What an observation itself tells of the threat model behind it."""


@final
@dataclass(frozen=True, kw_only=True)
class Standard(Attack):
    """Every member attacks; per victim the reconstruction with the best score wins, and all others are kept beside it.

    members: by name; version: of the list and its settings, raised whenever one changes, so that numbers are compared
    within one version (0: one's own). The score is one for all members, since their own losses have no common unit: how
    improbable a reconstruction is, ``evidence.improbability``. No truth is in it. What choosing by truth would have
    given is recorded as ``oracle_``.

    A member that needs what the threat model does not show, or cannot take the model, the update or the number of
    examples, is left out. Raises ``IncompatibleError`` where none is left, ``ConfigError`` for a member that needs a
    malicious server.
    """

    members: Mapping[str, Attack]
    version: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "members", dict(self.members))
        if not self.members:
            raise ConfigError("attack standard: members is empty; name at least one attack.")
        for name, member in self.members.items():
            if member.needs:
                raise ConfigError(
                    f"attack standard: {name} needs a malicious server, which plays a round of its own; launch it "
                    f"beside: attack=[standard,{name}]."
                )

    @property
    def requires(self) -> Knowledge:
        """What every one of them needs; a member that needs more is left out where it is not shown."""
        return Knowledge.NUM_EXAMPLES

    @property
    def remembers(self) -> bool:
        """Whether a member does."""
        return any(member.remembers for member in self.members.values())

    def check_victim(self, victim: Victim) -> None:
        """At least one member must take the model."""
        self._left(lambda member: _unfit(member, victim))

    def reconstruct_many(
        self,
        observations: Sequence[Observation],
        victim: Victim,
        *,
        seeds: Sequence[int],
        snapshots: Snapshots = FORGET,
    ) -> list[Reconstruction]:
        found: list[dict[str, Reconstruction]] = [{} for _ in observations]
        refused: dict[str, str | None] = {}
        # victims of one round look alike to the threat model, and may differ in their number of examples
        for count in dict.fromkeys(o.num_examples for o in observations):
            rows = [i for i, o in enumerate(observations) if o.num_examples == count]
            some, own = [observations[i] for i in rows], [seeds[i] for i in rows]
            for name, member in self._left(lambda m, first=some[0]: _refusal(m, first, victim)).items():  # type: ignore[misc]
                try:
                    rebuilt = member.reconstruct_many(some, victim, seeds=own, snapshots=Apart(snapshots, name))
                except IncompatibleError as why:
                    refused[name] = str(why)
                    log.debug("attack standard goes without %s: %s", name, why)
                    continue
                for i, one in zip(rows, rebuilt, strict=True):
                    found[i][name] = dataclasses.replace(one, score=improbability(one, observations[i], victim))
            if not found[rows[0]]:
                raise IncompatibleError(_nobody(refused))
        return [_best(candidates) for candidates in found]

    def _left(self, refusal: Callable[[Attack], str | None]) -> dict[str, Attack]:
        refused = {name: refusal(member) for name, member in self.members.items()}
        left = {name: member for name, member in self.members.items() if refused[name] is None}
        for name, why in refused.items():
            if why is not None:
                log.debug("attack standard goes without %s: %s", name, why)
        if not left:
            raise IncompatibleError(_nobody(refused))
        return left


def _best(candidates: Mapping[str, Reconstruction]) -> Reconstruction:
    name = min(candidates, key=lambda n: candidates[n].score)
    return dataclasses.replace(candidates[name], alternatives=dict(candidates))


def _nobody(refused: Mapping[str, str | None]) -> str:
    reasons = "; ".join(f"{name}: {why}" for name, why in refused.items())
    return f"attack standard has no member that can attack here. {reasons}"


def _refusal(member: Attack, observation: Observation, victim: Victim) -> str | None:
    """Why a member cannot attack here, or None."""
    needed = {flag: shown for flag, shown in _SHOWN.items() if flag in member.requires}
    unseen = [flag.name.lower() for flag, shown in needed.items() if flag.name and not shown(observation, victim)]
    if unseen:
        return f"it needs to see {', '.join(unseen)}"
    if member.max_examples is not None and (observation.num_examples or 0) > member.max_examples:
        return f"it takes at most {member.max_examples} example(s)"
    if member.max_local_steps is not None and observation.local is not None:
        steps = sum(map(len, observation.local.plan(observation.num_examples or 0)))
        if steps > member.max_local_steps:
            return f"it takes at most {member.max_local_steps} local step(s)"
    return _unfit(member, victim)


def _unfit(member: Attack, victim: Victim) -> str | None:
    try:
        member.check_victim(victim)
    except IncompatibleError as why:
        return str(why)
    return None
