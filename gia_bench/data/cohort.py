"""The clients of one round and their batches: the private side."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import final

import torch
from torch import Tensor

from gia_bench.data.source import Source
from gia_bench.values import Batch, Truth

CPU = torch.device("cpu")


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class Cohort:
    """Who takes part in a round, and with which examples. Images are gathered chunk by chunk, so that a cohort's
    size costs no memory.

    clients: K client numbers; steps: per client, the example indices of each local step; weights: per client, what its
    update counts in the mean; expected: per client, how many examples it says that its update holds, where the real
    number is private (Poisson batches; None: it says the real one).
    """

    round_index: int
    clients: tuple[int, ...]
    steps: tuple[tuple[Tensor, ...], ...]
    weights: tuple[int, ...]
    source: Source
    expected: tuple[int, ...] | None = None
    device: torch.device = CPU

    def to(self, device: torch.device, non_blocking: bool = False) -> Cohort:
        """The same cohort with batches made on ``device`` (Lightning calls this)."""
        return dataclasses.replace(self, device=device)

    @cached_property
    def counts(self) -> tuple[tuple[int, ...], ...]:
        """Per client, the number of examples in each local step."""
        return tuple(tuple(len(s) for s in steps) for steps in self.steps)

    def batch(self, members: Sequence[int]) -> Batch:
        """The batches [k, S, B, ...] of some members (positions in the cohort), padded to the longest among them, and
        to one example where all steps are empty."""
        num_steps = max(len(self.steps[m]) for m in members)
        size = max(1, *(max(self.counts[m]) for m in members))
        indices = torch.full((len(members), num_steps, size), -1)
        for row, m in enumerate(members):
            for s, step in enumerate(self.steps[m]):
                indices[row, s, : len(step)] = step
        flat = indices.clamp(min=0).flatten()
        images = self.source.images(flat)
        return Batch(
            images.view(*indices.shape, *images.shape[1:]).to(self.device),
            self.source.labels[flat].view(indices.shape).to(self.device),
            (indices >= 0).float().to(self.device),
        )

    @cached_property
    def num_examples(self) -> tuple[int, ...]:
        """Per client, how many distinct examples its local steps use."""
        return tuple(len(self.used([m])) for m in range(len(self.clients)))

    @property
    def said(self) -> tuple[int, ...]:
        """Per client, how many examples it says that its update holds."""
        return self.num_examples if self.expected is None else self.expected

    def truth(self, clients: Sequence[int]) -> Truth:
        """The distinct images behind the updates of some clients, in the order of their first use."""
        indices = torch.tensor(self.used([self.clients.index(c) for c in clients]), dtype=torch.int64)
        return Truth(self.source.images(indices).to(self.device), self.source.labels[indices].to(self.device))

    def used(self, members: Sequence[int]) -> list[int]:
        """The distinct examples behind the updates of some members, in the order of their first use."""
        return list(dict.fromkeys(int(i) for m in members for step in self.steps[m] for i in step))
