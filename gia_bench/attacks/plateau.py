"""A learning rate of every candidate's own: it falls where that candidate's loss has stopped falling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch

from gia_bench.attacks.checks import check
from gia_bench.attacks.optimizers import Evaluate, Moment, Move, Optimizer, Variables
from gia_bench.values import State

INNER = "inner."


@final
@dataclass(frozen=True, kw_only=True)
class Plateau(Optimizer):
    """``optimizer``, whose learning rate falls to ``factor`` of what it was for every candidate whose loss did not fall
    for more than ``patience`` steps; equal to ``torch.optim.lr_scheduler.ReduceLROnPlateau`` (with eps=0) candidate by
    candidate.

    factor: in (0, 1); patience: steps, at least 0; threshold: the share of the lowest loss by which it must fall to
    count, in [0, 1). The attack's schedule, which is the same for all, multiplies it. Forces see the schedule alone.
    """

    optimizer: Optimizer
    factor: float = 0.1
    patience: int = 10
    threshold: float = 1e-4

    def __post_init__(self) -> None:
        check(0 < self.factor < 1, "plateau.factor", self.factor, "a number in (0, 1)")
        check(self.patience >= 0, "plateau.patience", self.patience, "at least 0")
        check(0 <= self.threshold < 1, "plateau.threshold", self.threshold, "a number in [0, 1)")

    @property
    def lr(self) -> float:
        """That of ``optimizer``."""
        return self.optimizer.lr

    def init(self, variables: Variables) -> State:
        some = next(iter(variables.values()))
        return {
            "rate": some.new_ones(some.shape[:2]),
            "lowest": some.new_full(some.shape[:2], torch.inf),
            "waited": torch.zeros(some.shape[:2], dtype=torch.int64, device=some.device),
            **{INNER + k: v for k, v in self.optimizer.init(variables).items()},
        }

    def step(self, variables: Variables, state: State, evaluate: Evaluate, moment: Moment) -> Move:
        rate, lowest, waited = state["rate"], state["lowest"], state["waited"]
        inner = {k.removeprefix(INNER): v for k, v in state.items() if k.startswith(INNER)}
        move = self.optimizer.step(variables, inner, evaluate, moment._replace(rate=moment.rate * rate))
        fell = move.loss < lowest * (1 - self.threshold)
        waited = torch.where(fell, 0, waited + 1)
        falls = waited > self.patience
        own = {
            "rate": torch.where(falls, rate * self.factor, rate),
            "lowest": torch.where(fell, move.loss, lowest),
            "waited": torch.where(falls, 0, waited),
        }
        return move._replace(state={**own, **{INNER + k: v for k, v in move.state.items()}})
