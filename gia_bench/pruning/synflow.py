"""SynFlow: weights that carry the least of what flows through the whole network are pruned, without any data."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from torch.func import grad

from gia_bench.defenses.selection import Mask
from gia_bench.models.functional import Victim
from gia_bench.pruning.base import Pruning
from gia_bench.pruning.scores import Scores, check_cut, prunable, pruned_in_steps
from gia_bench.values import Buffers, Examples, Params


@final
@dataclass(frozen=True, kw_only=True)
class SynFlow(Pruning):
    """|theta dR / dtheta|, where R is the sum of the outputs for an image of ones, with the magnitudes of all
    parameters and buffers, in evaluation mode; scored and cut 100 times, exponentially (Tanaka et al. 2020).

    Computed in double: through deep networks the products leave single precision's range.

    density: share kept, in (0, 1]; epochs, schedule ("exponential" | "linear"): the steps on the way; prune_bias:
    biases of linear layers and convolutions too.
    """

    density: float = 0.2
    epochs: int = 100
    schedule: str = "exponential"
    prune_bias: bool = False

    def __post_init__(self) -> None:
        check_cut("synflow", self.density, self.epochs, self.schedule)

    def start(self, victim: Victim, public: Examples) -> Mask:
        """Scored at the first weights."""
        names = prunable(victim, bias=self.prune_bias)
        params, buffers = victim.initial()
        return pruned_in_steps(
            params, names, lambda left, epoch: synflow_scores(victim, left, buffers, names),
            density=self.density, epochs=self.epochs, schedule=self.schedule,
        )  # fmt: skip


def synflow_scores(victim: Victim, params: Params, buffers: Buffers, names: list[str]) -> Scores:
    """Each prunable weight's share in R, in double."""
    # ones as the network sees them, whatever the images' normalisation
    plain = dataclasses.replace(victim, mean=None, std=None)
    ones = torch.ones(1, *victim.input_shape, dtype=torch.float64)
    positive = {k: v.double().abs() for k, v in params.items()}
    fixed = {k: v.double().abs() if v.is_floating_point() else v.abs() for k, v in buffers.items()}

    def flow(own: Params) -> Tensor:
        return plain.logits(positive | own, fixed, ones, training=False)[0].sum()

    own = {name: positive[name] for name in names}
    return {name: (g * own[name]).abs() for name, g in grad(flow)(own).items()}
