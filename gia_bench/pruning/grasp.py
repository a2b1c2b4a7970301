"""GraSP: weights whose removal would weaken the flow of gradients least are pruned before training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from torch.func import grad

from gia_bench.defenses.checks import check
from gia_bench.defenses.selection import Mask
from gia_bench.models.functional import Victim
from gia_bench.pruning.base import Pruning
from gia_bench.pruning.scores import Scores, check_cut, mean_loss, prunable, pruned_in_steps, public_batches
from gia_bench.values import Batch, Buffers, Examples, Params

SMALL = 1e-10


@final
@dataclass(frozen=True, kw_only=True)
class GraSP(Pruning):
    """theta (H g), divided by |its sum| + 1e-10; one global threshold (Wang et al. 2020; code of Tanaka et al. 2020).

    g and H are the gradient and the Hessian of the loss of logits / temperature by the prunable tensors, summed over
    the batches of the public examples (as for SNIP), in evaluation mode.

    density: share kept, in (0, 1]; temperature: > 0; epochs, schedule ("exponential" | "linear"): the steps on the way;
    prune_bias: biases of linear layers and convolutions too; seed: of the choice of examples.
    """

    density: float = 0.2
    temperature: float = 200.0
    epochs: int = 1
    schedule: str = "exponential"
    prune_bias: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_cut("grasp", self.density, self.epochs, self.schedule)
        check("pruning grasp: temperature", self.temperature, lambda t: 0 < t < math.inf, "be finite and above 0")

    def start(self, victim: Victim, public: Examples) -> Mask:
        """Scored at the first weights."""
        names = prunable(victim, bias=self.prune_bias)
        batches = public_batches(public, victim.num_classes, self.seed)
        params, buffers = victim.initial()
        return pruned_in_steps(
            params, names,
            lambda left, epoch: grasp_scores(victim, left, buffers, batches, names, self.temperature),
            density=self.density, epochs=self.epochs, schedule=self.schedule,
        )  # fmt: skip


def grasp_scores(
    victim: Victim, params: Params, buffers: Buffers, batches: list[Batch], names: list[str], temperature: float
) -> Scores:
    """theta (H g) / (|sum theta (H g)| + 1e-10)."""

    def loss(own: Params) -> Tensor:
        return torch.stack([mean_loss(victim, params | own, buffers, b, temperature) for b in batches]).sum()

    own = {name: params[name] for name in names}
    fixed = grad(loss)(own)

    def along(weights: Params) -> Tensor:
        """g . gradient(theta), whose gradient is H g while g stands still."""
        return torch.stack([(fixed[n] * g).sum() for n, g in grad(loss)(weights).items()]).sum()

    scores = {name: hg * own[name] for name, hg in grad(along)(own).items()}
    total = torch.stack([s.sum() for s in scores.values()]).sum().abs() + SMALL
    return {name: s / total for name, s in scores.items()}
