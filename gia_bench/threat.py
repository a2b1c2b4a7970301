"""Threat models: the one valve between the private and the public side."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Flag, auto
from typing import TYPE_CHECKING, Protocol, final

from gia_bench.errors import ConfigError, choices
from gia_bench.values import Examples, Observation, Transcript, Truth

if TYPE_CHECKING:
    from gia_bench.defenses.base import Defense
    from gia_bench.federated.work import LocalWork


class Knowledge(Flag):
    """What an attacker sees. ``UPDATE`` is one client's update; ``AGGREGATE`` is only the sum over the cohort."""

    NONE = 0
    UPDATE = auto()
    AGGREGATE = auto()
    BUFFERS = auto()
    SENT_BUFFERS = auto()
    NUM_EXAMPLES = auto()
    LABELS = auto()
    LOCAL = auto()
    SHARED = auto()
    DEFENSE = auto()
    PUBLIC = auto()


class Power(Flag):
    """What a malicious server may change at the attacked rounds."""

    NONE = 0
    CHANGE_MODEL = auto()
    CHANGE_PARAMS = auto()


class Private(Protocol):
    """The private side of one round: the only place where the truth is kept."""

    def truth(self, clients: Sequence[int]) -> Truth:
        """The images behind the updates of some clients."""
        ...


def _flags(kind: type[Knowledge] | type[Power], names: Iterable[str]) -> int:
    known = {member.name.lower(): member for member in kind if member.name}
    value = 0
    for name in names:
        if name.lower() not in known:
            raise ConfigError(choices(kind.__name__.lower(), name, known))
        value |= known[name.lower()].value
    return value


@final
@dataclass(frozen=True)
class ThreatModel:
    """Who looks, and at what.

    ``ThreatModel.named("curious_server", knows=["update", "num_examples"])`` reads the names of the flags.
    """

    name: str
    knows: Knowledge
    power: Power = Power.NONE

    @classmethod
    def named(cls, name: str, knows: Iterable[str], power: Iterable[str] = ()) -> ThreatModel:
        """From lower-case flag names. Raises ``ConfigError`` for a name that does not exist."""
        threat = cls(name, Knowledge(_flags(Knowledge, knows)), Power(_flags(Power, power)))
        if bool(threat.knows & Knowledge.UPDATE) == bool(threat.knows & Knowledge.AGGREGATE):
            raise ConfigError(f"threat {name}: knows needs exactly one of 'update' and 'aggregate'.")
        return threat

    @property
    def sees_clients(self) -> bool:
        """Whether single clients' updates are seen (else only the aggregate)."""
        return Knowledge.UPDATE in self.knows

    def observe(
        self,
        transcript: Transcript,
        private: Private,
        client: int | None,
        *,
        local: LocalWork | None = None,
        defense: Defense | None = None,
        public: Examples | None = None,
    ) -> Observation:
        """What this attacker holds about ``client`` (``None``: about the sum of the cohort).

        ``private`` is read for the labels alone, and only where the threat model grants them.
        """
        sees = self.knows.__contains__
        one = client is not None
        if one != self.sees_clients:
            raise ConfigError(f"threat {self.name} sees {'clients' if self.sees_clients else 'only the aggregate'}.")
        behind = transcript.clients if client is None else (client,)
        labels = private.truth(behind).labels if sees(Knowledge.LABELS) else None
        if client is None:
            update, count, sent = transcript.aggregate, transcript.num_examples, None
        else:
            update, count = transcript.updates[client], transcript.payloads[client].num_examples
            sent = transcript.sent_buffers.get(client) if sees(Knowledge.SENT_BUFFERS) else None
        if labels is not None:
            count = len(labels)  # who is shown the labels of a Poisson batch can count them
        own = client in transcript.own_params
        return Observation(
            params=transcript.own_params[client] if own and client is not None else transcript.params,
            update=update,
            buffers=transcript.buffers if sees(Knowledge.BUFFERS) else {},
            shared=transcript.shared if sees(Knowledge.SHARED) else {},
            labels=labels,
            num_examples=count if sees(Knowledge.NUM_EXAMPLES) else None,
            local=local if sees(Knowledge.LOCAL) else None,
            defense=defense if sees(Knowledge.DEFENSE) else None,
            sent_buffers=sent,
            public=public if sees(Knowledge.PUBLIC) else None,
            num_clients=len(behind),
        )
