"""What a client does with its own data in one round: one gradient (FedSGD), or local steps (FedAvg)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple, Protocol, final

import torch
from torch import Tensor

from gia_bench.defenses.base import BatchLoss, Defense
from gia_bench.errors import ConfigError
from gia_bench.models.functional import Victim
from gia_bench.seeding import stream
from gia_bench.values import Batch, Buffers, Noise, Params, Update


class LocalResult(NamedTuple):
    """One client's raw update, its buffers afterwards, and its mean loss over the local steps (scalar)."""

    update: Update
    buffers: Buffers
    loss: Tensor


class LocalWork(Protocol):
    """One client's part of a round. ``learning_rate`` is that of a local step, None where there is none."""

    @property
    def learning_rate(self) -> float | None: ...

    def at(self, round_index: int) -> LocalWork:
        """The work as it is done in one round, with that round's learning rate."""
        ...

    def schedule(self, num_examples: int, seed: int, round_index: int, client: int) -> list[Tensor]:
        """The positions in the client's data that each local step uses, one int64 tensor per step."""
        ...

    def weight(self, num_examples: int, steps: Sequence[Tensor]) -> int:
        """The number of examples this client's update stands for."""
        ...

    def run(
        self, victim: Victim, defense: Defense, params: Params, buffers: Buffers, batch: Batch, noise: Noise,
        counts: Sequence[int] | None,
    ) -> LocalResult:  # fmt: skip
        """The work itself, pure and mappable. batch: [S, B, ...]; counts: real examples of each step, to cut off the
        padding exactly, or None to leave it to the mask."""
        ...


def decay(milestones: Sequence[int], gamma: float | Sequence[float], round_index: int) -> float:
    """A learning rate's factor in a round: the product of ``gamma`` (one, or one per milestone) over those passed."""
    factors = [gamma] * len(milestones) if isinstance(gamma, int | float) else gamma
    if len(factors) != len(milestones):
        raise ConfigError(f"milestones={list(milestones)} and gamma={gamma}: give one gamma, or one per milestone.")
    return prod(f for m, f in zip(milestones, factors, strict=True) if round_index >= m)


def step_of(batch: Batch, step: int, counts: Sequence[int] | None) -> Batch:
    """The batch [B, ...] of one local step."""
    end = None if counts is None else counts[step]
    return Batch(*(t[step, :end] for t in batch))


def _loss(victim: Victim, buffers: Buffers) -> BatchLoss:
    return lambda params, batch: victim.objective(params, buffers, batch)


def _check_batch_size(batch_size: int | None, num_examples: int, client: int) -> int:
    if batch_size is not None and batch_size > num_examples:
        raise ConfigError(
            f"fl.local.batch_size={batch_size}, but client {client} holds only {num_examples} examples; take a smaller "
            "batch, fewer clients, or fl.local.batch_size=null for all of a client's data at once."
        )
    return batch_size or num_examples


@final
@dataclass(frozen=True, kw_only=True)
class FedSGD:
    """One gradient on one batch per round. Batches walk through a client's shuffled data without replacement.

    batch_size: examples per client and round; None for all that the client holds.
    """

    batch_size: int | None = 8

    def __post_init__(self) -> None:
        if self.batch_size is not None and self.batch_size < 1:
            raise ConfigError(f"fl.local.batch_size={self.batch_size}: give at least 1, or null for all.")

    @property
    def learning_rate(self) -> float | None:
        """A gradient has no step size."""
        return None

    def at(self, round_index: int) -> LocalWork:
        """The same in every round."""
        return self

    def schedule(self, num_examples: int, seed: int, round_index: int, client: int) -> list[Tensor]:
        """One step: the ``round_index``-th batch of the client's walk; pure in its arguments."""
        size = _check_batch_size(self.batch_size, num_examples, client)
        epoch, place = divmod(round_index, num_examples // size)
        order = torch.randperm(num_examples, generator=stream(seed, "batch", client, epoch))
        return [order[place * size : (place + 1) * size]]

    def weight(self, num_examples: int, steps: Sequence[Tensor]) -> int:
        """The batch."""
        return sum(len(s) for s in steps)

    def run(
        self, victim: Victim, defense: Defense, params: Params, buffers: Buffers, batch: Batch, noise: Noise,
        counts: Sequence[int] | None,
    ) -> LocalResult:  # fmt: skip
        """The gradient of the mean loss."""
        gradient, after, loss = defense.gradient(_loss(victim, buffers), params, step_of(batch, 0, counts), noise, 0)
        return LocalResult(gradient, after, loss)


@final
@dataclass(frozen=True, kw_only=True)
class FedAvg:
    """Local SGD; the update is server - client weights (a pseudo-gradient for the server's optimizer).

    epochs: passes over the client's data, or steps: a fixed number of local steps (exactly one of the two);
    batch_size: None for all of a client's data; milestones: rounds from which ``learning_rate`` is multiplied by
    ``gamma``, one factor for all or one per milestone.
    """

    learning_rate: float = 0.1
    epochs: int | None = 1
    steps: int | None = None
    batch_size: int | None = 8
    momentum: float = 0.0
    weight_decay: float = 0.0
    milestones: Sequence[int] = ()
    gamma: float | Sequence[float] = 0.1

    def __post_init__(self) -> None:
        decay(self.milestones, self.gamma, 0)
        if (self.epochs is None) == (self.steps is None):
            raise ConfigError(
                f"fl.local needs exactly one of epochs and steps, got epochs={self.epochs} and steps={self.steps}; "
                "set the other one to null."
            )
        if (self.epochs or self.steps or 0) < 1 or not self.learning_rate > 0:
            raise ConfigError(
                f"fl.local needs at least one step and a positive learning rate, got epochs={self.epochs}, "
                f"steps={self.steps}, learning_rate={self.learning_rate}."
            )

    def at(self, round_index: int) -> LocalWork:
        """The learning rate after the milestones that have passed."""
        factor = decay(self.milestones, self.gamma, round_index)
        return dataclasses.replace(self, learning_rate=self.learning_rate * factor, milestones=(), gamma=1.0)

    def schedule(self, num_examples: int, seed: int, round_index: int, client: int) -> list[Tensor]:
        """Shuffled passes over the client's data; the last batch of a pass may be smaller."""
        size = _check_batch_size(self.batch_size, num_examples, client)
        per_epoch = -(-num_examples // size)
        total = self.steps if self.steps is not None else per_epoch * (self.epochs or 0)
        batches: list[Tensor] = []
        for epoch in range(-(-total // per_epoch)):
            order = torch.randperm(num_examples, generator=stream(seed, "batch", round_index, client, epoch))
            batches.extend(torch.split(order, size))
        return batches[:total]

    def weight(self, num_examples: int, steps: Sequence[Tensor]) -> int:
        """All that the client holds (FedAvg's n_k)."""
        return num_examples

    def run(
        self, victim: Victim, defense: Defense, params: Params, buffers: Buffers, batch: Batch, noise: Noise,
        counts: Sequence[int] | None,
    ) -> LocalResult:  # fmt: skip
        """SGD with momentum and weight decay as in ``torch.optim.SGD``; steps without any example change nothing."""
        rate = self.learning_rate
        weights, velocity = params, {k: torch.zeros_like(v) for k, v in params.items()}
        losses, active_steps = [], []
        for s in range(batch.mask.shape[0]):
            here = step_of(batch, s, counts)
            gradient, after, loss = defense.gradient(_loss(victim, buffers), weights, here, noise, s)
            active = here.mask.sum() > 0
            for k, w in weights.items():
                gradient[k] = gradient[k] + self.weight_decay * w
            moved = {k: self.momentum * v + gradient[k] for k, v in velocity.items()}
            weights = {k: torch.where(active, w - rate * moved[k], w) for k, w in weights.items()}
            velocity = {k: torch.where(active, moved[k], v) for k, v in velocity.items()}
            buffers = {k: torch.where(active, after[k], v) for k, v in buffers.items()}
            losses.append(loss * active)
            active_steps.append(active)
        loss = torch.stack(losses).sum() / torch.stack(active_steps).sum().clamp(min=1)
        return LocalResult({k: params[k] - w for k, w in weights.items()}, buffers, loss)
