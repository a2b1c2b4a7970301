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
from gia_bench.defenses.none import NoDefense
from gia_bench.errors import ConfigError
from gia_bench.models.functional import Victim
from gia_bench.seeding import stream
from gia_bench.values import Batch, Buffers, Noise, Params, Update

UNDEFENDED = NoDefense()


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
        """The positions in the client's data that each local step uses, one int64 tensor per step. How many they are
        depends on ``num_examples`` alone."""
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

    def plan(self, num_examples: int) -> list[list[slice]]:
        """What is public about a client's steps: for every pass over its data, the places in that pass's order that
        each step takes. Who stands at which place is drawn by the client and nobody else knows it."""
        ...

    def scale(self, num_examples: int) -> float:
        """The update of a gradient that stays the same from step to step, as a multiple of it."""
        ...

    def simulate(self, victim: Victim, params: Params, buffers: Buffers, passes: Sequence[Batch]) -> Update:
        """The update of an undefended client whose e-th pass walks through ``passes[e]`` [B, ...] from front to back;
        differentiable in them through every step. Where passes are missing, the last one is walked through again.
        """
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
    def loss(params: Params, batch: Batch, replaced: Buffers | None = None) -> tuple[Tensor, Buffers]:
        own = replaced or {}
        value, after = victim.objective(params, {**buffers, **own}, batch)
        return value, {**after, **{k: buffers[k] for k in own}}

    return loss


def _check_batch_size(batch_size: int | None, num_examples: int, client: int) -> int:
    if batch_size is not None and batch_size > num_examples:
        raise ConfigError(
            f"fl.local.batch_size={batch_size}, but client {client} holds only {num_examples} examples; take a smaller "
            "batch, fewer clients, or fl.local.batch_size=null for all of a client's data at once."
        )
    return batch_size or num_examples


def _check_positive(batch_size: int | None) -> None:
    if batch_size is not None and batch_size < 1:
        raise ConfigError(f"fl.local.batch_size={batch_size}: give at least 1, or null for all.")


class _Walk(NamedTuple):
    """Where local SGD stands: weights, momentum, buffers, and what each step found."""

    weights: Params
    velocity: Params
    buffers: Buffers
    losses: tuple[Tensor, ...] = ()
    active: tuple[Tensor, ...] = ()


@final
@dataclass(frozen=True, kw_only=True)
class FedSGD:
    """One gradient on one batch per round. Batches walk through a client's shuffled data without replacement.

    batch_size: examples per client and round; None for all that the client holds.
    """

    batch_size: int | None = 8

    def __post_init__(self) -> None:
        _check_positive(self.batch_size)

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

    def plan(self, num_examples: int) -> list[list[slice]]:
        """One pass of one step: all the examples that the update stands for."""
        return [[slice(0, num_examples)]]

    def scale(self, num_examples: int) -> float:
        """1: the gradient itself."""
        return 1.0

    def simulate(self, victim: Victim, params: Params, buffers: Buffers, passes: Sequence[Batch]) -> Update:
        """The gradient of the mean loss over the first pass."""
        return UNDEFENDED.gradient(_loss(victim, buffers), params, passes[0], {}, 0)[0]


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
        _check_positive(self.batch_size)

    def at(self, round_index: int) -> LocalWork:
        """The learning rate after the milestones that have passed."""
        factor = decay(self.milestones, self.gamma, round_index)
        return dataclasses.replace(self, learning_rate=self.learning_rate * factor, milestones=(), gamma=1.0)

    def schedule(self, num_examples: int, seed: int, round_index: int, client: int) -> list[Tensor]:
        """Shuffled passes over the client's data; the last batch of a pass may be smaller."""
        _check_batch_size(self.batch_size, num_examples, client)
        batches: list[Tensor] = []
        for epoch, places in enumerate(self.plan(num_examples)):
            order = torch.randperm(num_examples, generator=stream(seed, "batch", round_index, client, epoch))
            batches.extend(order[place] for place in places)
        return batches

    def weight(self, num_examples: int, steps: Sequence[Tensor]) -> int:
        """All that the client holds (FedAvg's n_k)."""
        return num_examples

    def run(
        self, victim: Victim, defense: Defense, params: Params, buffers: Buffers, batch: Batch, noise: Noise,
        counts: Sequence[int] | None,
    ) -> LocalResult:  # fmt: skip
        """SGD with momentum and weight decay as in ``torch.optim.SGD``; steps without any example change nothing."""
        walk = self._start(params, buffers)
        for s in range(batch.mask.shape[0]):
            walk = self._step(walk, victim, defense, step_of(batch, s, counts), noise)
        loss = torch.stack(walk.losses).sum() / torch.stack(walk.active).sum().clamp(min=1)
        return LocalResult({k: params[k] - w for k, w in walk.weights.items()}, walk.buffers, loss)

    def plan(self, num_examples: int) -> list[list[slice]]:
        """Passes of ``batch_size`` examples a step; the last step of a pass takes what is left, and with ``steps`` the
        last pass stops early."""
        size = min(self.batch_size or num_examples, num_examples)
        one = [slice(start, min(start + size, num_examples)) for start in range(0, num_examples, size)]
        total = self.steps if self.steps is not None else len(one) * (self.epochs or 0)
        return [one[: total - done] for done in range(0, total, len(one))]

    def scale(self, num_examples: int) -> float:
        """The learning rate times the number of steps; with momentum, each step counts in all that follow it."""
        steps = sum(len(places) for places in self.plan(num_examples))
        return self.learning_rate * sum(self.momentum ** (s - t) for s in range(steps) for t in range(s + 1))

    def simulate(self, victim: Victim, params: Params, buffers: Buffers, passes: Sequence[Batch]) -> Update:
        """The same steps as ``run`` takes, in the order of ``passes``."""
        walk = self._start(params, buffers)
        for epoch, places in enumerate(self.plan(passes[0].mask.shape[0])):
            data = passes[min(epoch, len(passes) - 1)]
            for place in places:
                walk = self._step(walk, victim, UNDEFENDED, Batch(*(t[place] for t in data)), {})
        return {k: params[k] - w for k, w in walk.weights.items()}

    def _start(self, params: Params, buffers: Buffers) -> _Walk:
        return _Walk(params, {k: torch.zeros_like(v) for k, v in params.items()}, buffers)

    def _step(self, walk: _Walk, victim: Victim, defense: Defense, batch: Batch, noise: Noise) -> _Walk:
        weights, velocity, buffers = walk.weights, walk.velocity, walk.buffers
        gradient, after, loss = defense.gradient(_loss(victim, buffers), weights, batch, noise, len(walk.losses))
        active = batch.mask.sum() > 0
        decayed = {k: gradient[k] + self.weight_decay * w for k, w in weights.items()}
        moved = {k: self.momentum * v + decayed[k] for k, v in velocity.items()}
        return _Walk(
            weights={k: torch.where(active, w - self.learning_rate * moved[k], w) for k, w in weights.items()},
            velocity={k: torch.where(active, moved[k], v) for k, v in velocity.items()},
            buffers={k: torch.where(active, after[k], v) for k, v in buffers.items()},
            losses=(*walk.losses, loss * active),
            active=(*walk.active, active),
        )
