"""Aligned dual gradient pruning: all clients send the entries that one of them chose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch

from gia_bench.defenses.base import AskClient
from gia_bench.defenses.feedback import Select
from gia_bench.defenses.selection import band, check_band, exact
from gia_bench.defenses.withholding import Withholding
from gia_bench.errors import ConfigError, choices
from gia_bench.values import Noise, Params, Shared, State
from gia_bench.wire.aligned import MASK

LEADERS = ("first", "round_robin", "random")


@final
@dataclass(frozen=True, kw_only=True)
class ADGP(Withholding):
    """DGP with one mask a round for the whole cohort, so that only values travel and the mean is sparse too.

    Of ADGP (Hu et al. 2022) only this is public: positions are aligned among clients, the download becomes sparse, and
    a trusted broadcaster is needed. gia_bench choices: the broadcaster is a client of the round's cohort; its
    mask is DGP's on its own update with its residual; every client, the leader too, has its own error feedback. The
    server sees where the leader's middle ranks lie, and a fixed leader shows it each round. What a band says of
    withheld entries holds for the leader alone, so that attackers are held to no ``violation``, as they are under DGP.

    k1, k2, scope: as in DGP; leader: a position in the round's cohort, "first" | "round_robin" (the round's number
    modulo the cohort's size) | "random".
    """

    k1: float = 0.05
    k2: float = 0.75
    scope: str = "tensor"
    leader: str = "first"

    def __post_init__(self) -> None:
        check_band("adgp", self.k1, self.k2, self.scope)
        if self.leader not in LEADERS:
            raise ConfigError(choices("defense adgp: leader", self.leader, LEADERS))

    @property
    def asks_a_leader(self) -> bool:
        """Always: the mask is the leader's."""
        return True

    def announce(
        self,
        like: Params,
        server_state: State,
        round_index: int,
        num_clients: int,
        draw: torch.Generator,
        ask: AskClient,
    ) -> Shared:
        """``mask.<parameter>``: bool, the leader's selection."""
        position = {
            "first": 0,
            "round_robin": round_index % num_clients,
            "random": int(torch.randint(num_clients, (), generator=draw)),
        }[self.leader]
        update, state = ask(position)
        mask = band(self.error_feedback.accumulated(update, state), exact(self.k1), exact(self.k2), self.scope)
        return {MASK + name: kept for name, kept in mask.items()}

    def choice(self, shared: Shared, noise: Noise) -> Select:
        """The announced entries."""
        return lambda full: {name: shared[MASK + name] for name in full}
