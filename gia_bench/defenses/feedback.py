"""Error feedback: what was not sent is remembered and added to the next update."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias, final

import torch
from torch import Tensor

from gia_bench.defenses.checks import check
from gia_bench.defenses.selection import Mask
from gia_bench.errors import ConfigError
from gia_bench.values import Params, State, Update

Select: TypeAlias = Callable[[Update], Mask]
"""(update with its residual) -> which entries are sent."""

RESIDUAL, SENT = "residual.", "sent."


@final
@dataclass(frozen=True, kw_only=True)
class ErrorFeedback:
    """accumulated = update + scale * residual; sent = its selected entries; residual' = decay * (accumulated - sent).

    With decay 1, sent + residual' is the accumulated update exactly. An entry that is never selected keeps
    accumulating: under DGP the residual of the largest entries grows without end (measured by ``residual_norm`` and
    ``never_sent_share``), and decay < 1 bounds it. scale: >= 0; decay: in [0, 1]. enabled=False: no state, nothing is
    remembered.

    State: ``residual.<parameter>`` like the parameter; ``sent.<parameter>`` bool, whether something other than zero was
    ever sent there. Source: the DGP authors' training code (scale 1, on); decay is a gia_bench choice.
    """

    enabled: bool = True
    scale: float = 1.0
    decay: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.enabled, bool):
            raise ConfigError(f"error_feedback.enabled={self.enabled!r} must be true or false.")
        check("error_feedback.scale", self.scale, lambda s: 0 <= s < math.inf, "be finite and at least 0")
        check("error_feedback.decay", self.decay, lambda d: 0 <= d <= 1, "lie in [0, 1]; 1 forgets nothing")

    @property
    def repays(self) -> bool:
        """Whether what is withheld is sent later as it is, neither lost nor changed."""
        return self.enabled and self.scale == self.decay == 1

    def initial(self, like: Params) -> State:
        """Nothing withheld and nothing sent."""
        if not self.enabled:
            return {}
        residual = {RESIDUAL + name: torch.zeros_like(param) for name, param in like.items()}
        return residual | {SENT + name: torch.zeros_like(param, dtype=torch.bool) for name, param in like.items()}

    def accumulated(self, update: Update, state: State) -> Update:
        """The update with what was withheld before."""
        if not self.enabled:
            return update
        return {name: torch.add(u, state[RESIDUAL + name], alpha=self.scale) for name, u in update.items()}

    def send(self, update: Update, state: State, select: Select) -> tuple[Update, State]:
        """What is sent, and the next state.

        NaN and infinity are always sent, those that were not selected as NaN: withheld, they would hide a broken client
        from the server and stay in the residual for ever.
        """
        full = self.accumulated(update, state)
        # a product, not torch.where, which takes several times as long on a CPU where the mask is irregular; adding 0
        # turns -0.0 into 0.0
        mask = select(full)
        sent = {name: (u * mask[name]).add_(0.0) for name, u in full.items()}
        if not self.enabled:
            return sent, state
        # what was sent leaves exactly 0, or NaN where it was not finite
        owed = {name: (u - sent[name]).nan_to_num_(0, 0, 0) for name, u in full.items()}
        residual = {RESIDUAL + name: u if self.decay == 1 else self.decay * u for name, u in owed.items()}
        ever = {SENT + name: state[SENT + name] | u.bool() for name, u in sent.items()}
        return sent, residual | ever

    def measure(self, state: State) -> dict[str, Tensor]:
        """``residual_norm``: Euclidean, over all parameters; ``never_sent_share``: of all entries, in [0, 1]."""
        residuals = [t for name, t in state.items() if name.startswith(RESIDUAL)]
        if not residuals:
            return {}
        sent = [t for name, t in state.items() if name.startswith(SENT)]
        total = sum(t.numel() for t in sent)
        norms = torch.stack([torch.linalg.vector_norm(t.float()) for t in residuals])
        counts = torch.stack([t.count_nonzero() for t in sent])
        return {
            "residual_norm": torch.linalg.vector_norm(norms),
            "never_sent_share": 1 - counts.sum() / total,
        }
