"""What an attacker has seen of every client in earlier attacked rounds."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any, final

from gia_bench.federated.work import LocalWork
from gia_bench.values import Observation

_TENSORS = ("params", "update", "buffers", "shared", "labels", "num_examples", "num_clients", "sent_buffers")
"""What differs from round to round and can stand in a checkpoint; the rest is part of the run's settings."""


@final
class History:
    """Observations by client (None: the sum of the cohort), in the order of their rounds. rounds: in how many each took
    part so far, attacked or not."""

    def __init__(self) -> None:
        self._seen: dict[int | None, dict[int, Observation]] = {}
        self.rounds: Counter[int] = Counter()

    def add(self, client: int | None, round_index: int, observation: Observation) -> None:
        """Keep one; of a round that is played again, the last."""
        self._seen.setdefault(client, {})[round_index] = observation

    def before(self, client: int | None, round_index: int) -> tuple[Observation, ...]:
        """The client's observations of earlier rounds."""
        return tuple(o for r, o in sorted(self._seen.get(client, {}).items()) if r < round_index)

    def known_to(self, client: int | None, observation: Observation, round_index: int) -> Observation:
        """What the attacker holds in this round, with what he saw before and how many rounds he did not see."""
        earlier = self.before(client, round_index)
        unseen = 0 if client is None else max(self.rounds[client] - len(earlier), 0)
        return dataclasses.replace(observation, earlier=earlier, unseen=unseen)

    def pack(self) -> list[dict[str, Any]]:
        """Tensors and numbers, for a checkpoint."""
        return [
            {"client": client, "round": r, **{name: getattr(o, name) for name in _TENSORS}}
            for client, rounds in self._seen.items()
            for r, o in rounds.items()
        ]

    def unpack(self, packed: list[dict[str, Any]], like: Observation, local: LocalWork) -> None:
        """The inverse of ``pack``; what the settings say is ``like``'s, and each round's local work ``local``'s.

        A threat model that did not show the local work in ``like`` did not show it before.
        """
        shown: dict[int, LocalWork | None] = {}  # one object per round, so that its victims are still one batch
        for entry in packed:
            client, r = entry["client"], entry["round"]
            if r in self._seen.get(client, {}):
                continue
            shown.setdefault(r, None if like.local is None else local.at(r))
            own = {name: entry[name] for name in _TENSORS}
            self.add(client, r, dataclasses.replace(like, **own, local=shown[r], earlier=()))
