"""What every kind of local step is made of."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from torch import Tensor

from gia_bench.defenses.base import BatchLoss
from gia_bench.errors import ConfigError
from gia_bench.models.functional import Victim
from gia_bench.values import Batch, Buffers, Params


def decay(milestones: Sequence[int], gamma: float | Sequence[float], round_index: int) -> float:
    """A learning rate's factor in a round: the product of ``gamma`` (one, or one per milestone) over those passed."""
    factors = [gamma] * len(milestones) if isinstance(gamma, int | float) else gamma
    if len(factors) != len(milestones):
        raise ConfigError(f"milestones={list(milestones)} and gamma={gamma}: give one gamma, or one per milestone.")
    return prod(f for m, f in zip(milestones, factors, strict=True) if round_index >= m)


def step_of(batch: Batch, step: int, counts: Sequence[int] | None) -> Batch:
    """The batch [B, ...] of one local step. An empty one keeps a row of padding: no layer is given a batch of none."""
    end = None if counts is None else max(counts[step], 1)
    return Batch(*(t[step, :end] for t in batch))


def loss_of(victim: Victim, buffers: Buffers) -> BatchLoss:
    """The mean loss over a batch, as a defense computes its gradients from it."""

    def loss(params: Params, batch: Batch, replaced: Buffers | None = None) -> tuple[Tensor, Buffers]:
        own = replaced or {}
        value, after = victim.objective(params, {**buffers, **own}, batch)
        return value, {**after, **{k: buffers[k] for k in own}}

    return loss
