"""The settings of a federation: how many rounds, who plays, what the server does, when it is measured and attacked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, final

import torch
from torch import nn

from gia_bench.errors import ConfigError
from gia_bench.federated.execution import Executor
from gia_bench.federated.states import check_storage
from gia_bench.federated.steps import decay
from gia_bench.federated.work import LocalWork


@final
@dataclass(frozen=True, kw_only=True)
class ServerOptimizer:
    """Any ``torch.optim`` optimizer on the pseudo-gradient. SGD with lr 1 on FedAvg's updates is FedAvg; with momentum
    FedAvgM; Adam is FedAdam. milestones: rounds from which the learning rate is multiplied by ``gamma`` (one factor for
    all, or one per milestone).
    """

    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
    milestones: Sequence[int] = ()
    gamma: float | Sequence[float] = 0.1

    def __post_init__(self) -> None:
        decay(self.milestones, self.gamma, 0)

    def configure(self, parameters: Iterable[nn.Parameter]) -> dict[str, Any]:
        """What Lightning's ``configure_optimizers`` returns."""
        optimizer = self.optimizer(parameters)
        factor = partial(decay, self.milestones, self.gamma)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


@final
@dataclass(frozen=True, kw_only=True)
class Schedule:
    """When what happens, counted in rounds from 0.

    clients_per_round: None for all; eval_every: rounds between two measurements of accuracy (the last round is always
    measured); attack_rounds: where the attacks look; attack_clients: how many of the cohort they look at, from its
    first; client_states: where the defense's residuals live between rounds, "memory" | "disk" (files in the run's
    folder). Raises ``ConfigError`` for a round never played.
    """

    rounds: int
    local: LocalWork
    server: ServerOptimizer
    executor: Executor
    clients_per_round: int | None = None
    weighting: str = "examples"
    on_nonfinite: str = "fail"
    client_states: str = "memory"
    eval_every: int = 10
    attack_rounds: Sequence[int] = (0,)
    attack_clients: int = 1

    def __post_init__(self) -> None:
        check_storage(self.client_states)
        if isinstance(self.executor, str):
            raise ConfigError(f"fl.executor={self.executor}: choose it with fl.executor.kind={self.executor}.")
        object.__setattr__(self, "attack_rounds", tuple(sorted(set(self.attack_rounds))))
        if self.rounds < 1 or self.eval_every < 1:
            raise ConfigError(f"fl.rounds={self.rounds} and fl.eval_every={self.eval_every}: both must be at least 1.")
        beyond = [r for r in self.attack_rounds if not 0 <= r < self.rounds]
        if beyond:
            raise ConfigError(
                f"fl.attack_rounds={list(self.attack_rounds)}: round {beyond[0]} is never played, since fl.rounds="
                f"{self.rounds} and rounds count from 0. Raise fl.rounds or attack an earlier round."
            )
        if self.attack_clients < 1:
            raise ConfigError(
                f"fl.attack_clients={self.attack_clients}: give at least 1, or fl.attack_rounds=[] for none."
            )
