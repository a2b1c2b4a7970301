"""No pruning: every weight is trained and sent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from gia_bench.defenses.selection import Mask
from gia_bench.models.functional import Victim
from gia_bench.pruning.base import Pruning
from gia_bench.values import Examples


@final
@dataclass(frozen=True, kw_only=True)
class NoPruning(Pruning):
    """The control."""

    def start(self, victim: Victim, public: Examples) -> Mask:
        """No masks at all."""
        return {}
