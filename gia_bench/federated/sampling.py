"""Who is in a client's local step: a piece of its shuffled data, or every example by a draw of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from gia_bench.errors import ConfigError, choices
from gia_bench.values import Batch, Update

SHUFFLED, POISSON = "shuffled", "poisson"


def check_sampling(sampling: str, batch_size: int | None) -> None:
    """Raises ``ConfigError`` for a way of sampling that does not exist, and for a batch size below 1."""
    if sampling not in (SHUFFLED, POISSON):
        raise ConfigError(choices("fl.local.sampling", sampling, (SHUFFLED, POISSON)))
    if batch_size is not None and batch_size < 1:
        raise ConfigError(f"fl.local.batch_size={batch_size}: give at least 1, or null for all.")


def check_held(batch_size: int | None, num_examples: int, client: int) -> int:
    """The batch size, or all that the client holds. Raises ``ConfigError`` where it holds less than a batch."""
    if batch_size is not None and batch_size > num_examples:
        raise ConfigError(
            f"fl.local.batch_size={batch_size}, but client {client} holds only {num_examples} examples; take a smaller "
            "batch, fewer clients, or fl.local.batch_size=null for all of a client's data at once."
        )
    return batch_size or num_examples


def poisson(num_examples: int, expected: int, generator: torch.Generator) -> Tensor:
    """The positions of those that are in: each one, whoever else is, with the chance ``expected / num_examples``."""
    drawn = torch.rand(num_examples, generator=generator, dtype=torch.float64)
    return (drawn < expected / num_examples).nonzero().flatten()


def poisson_rate(sampling: str, batch_size: int | None, num_examples: int) -> float | None:
    """That chance; None where batches are shuffled."""
    return (batch_size or num_examples) / num_examples if sampling == POISSON else None


def expected_examples(num_examples: int, rate: float, num_steps: int) -> int:
    """How many distinct examples steps of Poisson batches hold on average, rounded, at least 1: what a client may say,
    for how many they really hold is private."""
    return max(1, round(num_examples * (1 - (1 - rate) ** num_steps)))


def share_of_expected(batch: Batch, sampling: str, batch_size: int | None) -> Tensor | float:
    """What makes a mean over the examples of a step [B, ...] their sum over the number expected.

    A Poisson batch's own size is private, so nothing may be divided by it; and its sum over ``batch_size`` has the mean
    gradient as its expectation. 1 for shuffled batches, whose size is public. An empty batch counts as one example, as
    in ``Defense.gradient``: what noise was added to its sum of zero is divided like any other.
    """
    if sampling == SHUFFLED or batch_size is None:
        return 1.0
    return batch.mask.sum().clamp(min=1) / batch_size


def scaled(update: Update, share: Tensor | float) -> Update:
    """``share`` times the update; where that is 1, itself."""
    return update if isinstance(share, float) and share == 1 else {k: share * u for k, u in update.items()}
