"""Top-k: only the largest entries are sent. The control for DGP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor

from gia_bench.defenses.checks import check
from gia_bench.defenses.feedback import Select
from gia_bench.defenses.selection import Mask, band, check_scope, exact, violation
from gia_bench.defenses.withholding import Withholding
from gia_bench.values import Noise, Observation, Shared, Update


@final
@dataclass(frozen=True, kw_only=True)
class TopK(Withholding):
    """Sends the n - floor((1 - keep) n) entries of largest magnitude (ceil(keep n), at least one per tensor).

    keep: share in (0, 1]; scope: "tensor" (n entries of each) or "global" (of all together). Ranks and ties as in
    ``selection``. keep = 1 - k1 - k2 sends exactly as many entries of every tensor as DGP(k1, k2).
    """

    keep: float = 0.2
    scope: str = "tensor"

    def __post_init__(self) -> None:
        check("defense top_k: keep", self.keep, lambda s: 0 < s <= 1, "lie in (0, 1]; it is a share, 0.2 means 20 %")
        check_scope("top_k", self.scope)

    def choice(self, shared: Shared, noise: Noise) -> Select:
        """``select``."""
        return self.select

    def select(self, update: Update) -> Mask:
        """True where an entry is sent."""
        return band(update, exact(0), 1 - exact(self.keep), self.scope)

    def violation(self, update: Update, observation: Observation) -> Tensor:
        """Missing entries lie below the smallest sent one: exact without a residual, which takes part in the ranks and
        which nobody else sees."""
        return violation(update, observation.update, exact(0), self.scope)
