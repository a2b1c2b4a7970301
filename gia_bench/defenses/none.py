"""No defense: the control of every table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from gia_bench.defenses.base import Client, Defense
from gia_bench.values import Noise, Shared, State, Update


@final
@dataclass(frozen=True, kw_only=True)
class NoDefense(Defense):
    """The update is sent as it is."""

    def protect(
        self, update: Update, client: Client, state: State, shared: Shared, noise: Noise
    ) -> tuple[Update, State]:
        """The update itself."""
        return update, state
