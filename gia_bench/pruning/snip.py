"""SNIP: weights whose removal would change the loss least are pruned before or right after the first round."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from torch.func import grad

from gia_bench.defenses.selection import Mask
from gia_bench.errors import ConfigError, choices
from gia_bench.models.functional import Victim
from gia_bench.pruning.base import Pruning
from gia_bench.pruning.scores import (
    Scores,
    above_threshold,
    check_cut,
    everything,
    mean_loss,
    prunable,
    pruned_in_steps,
    public_batches,
)
from gia_bench.values import Batch, Buffers, Examples, Params, Update

PUBLIC, FIRST_ROUND = "public", "first_round"


@final
@dataclass(frozen=True, kw_only=True)
class SNIP(Pruning):
    """|dL / dm| for masks m = 1 on the weights, divided by the sum of all; one global threshold (Lee et al. 2019).

    scored_on: whose gradient it is.

    * "public": of the sum of the mean losses of batches of 256, on 10 public examples per class (Synaptic-Flow's
      loader), in evaluation mode and without a model's own penalty; the masks hold from round 0 on.
    * "first_round" (PruneFL's code): round 0 is dense, and after it a weight's score is |w u|, with w the weight before
      that round and u its part in the mean of what the clients sent; the masks hold from round 1 on. Nothing is sent
      for it. A learning rate in u and the sum of the scores are the same for all weights and do not matter. gia_bench
      choices: u is what the defense left of the gradient and compensated; ties as for the other methods, so that
      weights that nobody sent anything for all go, however many they are.

    density: share kept, in (0, 1]; epochs, schedule ("exponential" | "linear"): the steps on the way, of "public" only;
    prune_bias: biases of linear layers and convolutions too; seed: of the choice of public examples.
    """

    density: float = 0.2
    scored_on: str = PUBLIC
    epochs: int = 1
    schedule: str = "exponential"
    prune_bias: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_cut("snip", self.density, self.epochs, self.schedule)
        if self.scored_on not in (PUBLIC, FIRST_ROUND):
            raise ConfigError(choices("pruning snip: scored_on", self.scored_on, (PUBLIC, FIRST_ROUND)))
        if self.scored_on == FIRST_ROUND and self.epochs != 1:
            raise ConfigError(
                f"pruning snip: epochs={self.epochs} with scored_on=first_round, where one round's gradient is all "
                "there is; set epochs to 1, or take scored_on=public."
            )

    def start(self, victim: Victim, public: Examples) -> Mask:
        """Scored at the first weights, or everything."""
        params, buffers = victim.initial()
        names = prunable(victim, bias=self.prune_bias)
        if self.scored_on == FIRST_ROUND:
            return everything(params, names)
        batches = public_batches(public, victim.num_classes, self.seed)
        return pruned_in_steps(
            params, names, lambda left, epoch: snip_scores(victim, left, buffers, batches, names),
            density=self.density, epochs=self.epochs, schedule=self.schedule,
        )  # fmt: skip

    def strength(self, round_index: int) -> float | None:
        """The share that goes after round 0, where the masks wait for it."""
        return 1 - self.density if self.scored_on == FIRST_ROUND and round_index == 0 else None

    def watches(self, strength: float | None) -> bool:
        """Never: what clients send is enough."""
        return False

    def judge(self, victim: Victim, aggregate: Update) -> dict[str, Tensor]:
        """|w u| of the first weights; asked after round 0 only."""
        params, _ = victim.initial()
        names = prunable(victim, bias=self.prune_bias)
        return {name: (params[name].to(aggregate[name]) * aggregate[name]).abs() for name in names}

    def adjust(self, params: Params, masks: Mask, evidence: dict[str, Tensor], strength: float) -> Mask:
        """The highest scores of round 0."""
        return above_threshold({name: evidence[name] for name in masks}, self.density)


def snip_scores(victim: Victim, params: Params, buffers: Buffers, batches: list[Batch], names: list[str]) -> Scores:
    """|theta g| / sum |theta g|: the derivative by a mask on a weight is the weight times its gradient."""

    def loss(own: Params) -> Tensor:
        return torch.stack([mean_loss(victim, params | own, buffers, batch) for batch in batches]).sum()

    own = {name: params[name] for name in names}
    scores = {name: (g * own[name]).abs() for name, g in grad(loss)(own).items()}
    total = torch.stack([s.sum() for s in scores.values()]).sum()
    # a model whose gradient vanishes has scores of 0, not of 0 / 0
    return {name: torch.where(total > 0, s / total, s) for name, s in scores.items()}
