"""Batches one example at a time (Zhu et al. 2019, DLG, for batches): at step i only example i mod B moves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from gia_bench.attacks.optimizers import Evaluate, Moment, Move, Optimizer, Variables
from gia_bench.values import State


@final
@dataclass(frozen=True, kw_only=True)
class OneAtATime(Optimizer):
    """``optimizer`` on the image and label of example i mod B, the others held where they are; B steps are one round.

    Every example has an optimiser state of its own, as if it had its own ``torch.optim`` object: L-BFGS keeps one
    history per example (the papers do not say; gia_bench choice). The others have moved when an example's turn comes
    again, so the first pair of a turn compares gradients of two different functions, as it does in torch.
    """

    optimizer: Optimizer

    @property
    def lr(self) -> float:
        """That of ``optimizer``."""
        return self.optimizer.lr

    def init(self, variables: Variables) -> State:
        B = _count(variables)
        resting = {"resting": torch.zeros_like(next(iter(variables.values())).flatten(2)[..., 0], dtype=torch.int64)}
        return resting | {f"{b}.{k}": v for b in range(B) for k, v in self.optimizer.init(_only(variables, b)).items()}

    def step(self, variables: Variables, state: State, evaluate: Evaluate, moment: Moment) -> Move:
        B = _count(variables)
        everything = variables
        turn, b = divmod(moment.step, B)

        def evaluate_one(variables: Variables, wanted: Tensor | None = None) -> tuple[Tensor, Variables]:
            loss, gradients = evaluate(_put(everything, variables, b), wanted)
            return loss, _only(gradients, b)

        prefix = f"{b}."
        own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        move = self.optimizer.step(
            _only(variables, b), own, evaluate_one, Moment(turn, -(-moment.steps // B), moment.rate)
        )
        # one example at rest moves again when another one has moved; a whole round at rest is the end
        resting = torch.where(move.settled, state["resting"] + 1, 0)
        after = {**state, **{prefix + k: v for k, v in move.state.items()}, "resting": resting}
        return Move(move.loss, _put(variables, move.variables, b), after, resting >= B)


def _count(variables: Variables) -> int:
    return next(iter(variables.values())).shape[2]


def _only(variables: Variables, b: int) -> Variables:
    return {k: v[:, :, b : b + 1] for k, v in variables.items()}


def _put(variables: Variables, one: Variables, b: int) -> Variables:
    return {k: torch.cat([v[:, :, :b], one[k], v[:, :, b + 1 :]], 2) for k, v in variables.items()}
