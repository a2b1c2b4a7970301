"""SNIP: weights whose removal would change the loss least are pruned before training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from torch.func import grad

from gia_bench.defenses.selection import Mask
from gia_bench.models.functional import Victim
from gia_bench.pruning.base import Pruning
from gia_bench.pruning.scores import Scores, check_cut, mean_loss, prunable, pruned_in_steps, public_batches
from gia_bench.values import Batch, Buffers, Examples, Params


@final
@dataclass(frozen=True, kw_only=True)
class SNIP(Pruning):
    """|dL / dm| for masks m = 1 on the weights, divided by the sum of all; one global threshold (Lee et al. 2019).

    The gradient is of the sum of the mean losses of batches of 256, on 10 public examples per class (Synaptic-Flow's
    loader), in evaluation mode and without a model's own penalty. PruneFL's variant, which scores with the clients'
    mean gradient after round 0, is left out.

    density: share kept, in (0, 1]; epochs, schedule ("exponential" | "linear"): the steps on the way; prune_bias:
    biases of linear layers and convolutions too; seed: of the choice of examples.
    """

    density: float = 0.2
    epochs: int = 1
    schedule: str = "exponential"
    prune_bias: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_cut("snip", self.density, self.epochs, self.schedule)

    def start(self, victim: Victim, public: Examples) -> Mask:
        """Scored at the first weights."""
        names = prunable(victim, bias=self.prune_bias)
        batches = public_batches(public, victim.num_classes, self.seed)
        params, buffers = victim.initial()
        return pruned_in_steps(
            params, names, lambda left, epoch: snip_scores(victim, left, buffers, batches, names),
            density=self.density, epochs=self.epochs, schedule=self.schedule,
        )  # fmt: skip


def snip_scores(victim: Victim, params: Params, buffers: Buffers, batches: list[Batch], names: list[str]) -> Scores:
    """|theta g| / sum |theta g|: the derivative by a mask on a weight is the weight times its gradient."""

    def loss(own: Params) -> Tensor:
        return torch.stack([mean_loss(victim, params | own, buffers, batch) for batch in batches]).sum()

    own = {name: params[name] for name in names}
    scores = {name: (g * own[name]).abs() for name, g in grad(loss)(own).items()}
    total = torch.stack([s.sum() for s in scores.values()]).sum()
    # a model whose gradient vanishes has scores of 0, not of 0 / 0
    return {name: torch.where(total > 0, s / total, s) for name, s in scores.items()}
