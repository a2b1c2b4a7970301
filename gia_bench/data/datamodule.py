"""Cohorts and test batches for Lightning; everything is a pure function of (seed, round)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import lightning as L
import torch
from torch import Tensor

from gia_bench.data.cohort import Cohort
from gia_bench.data.partition import Partition
from gia_bench.data.source import Dataset
from gia_bench.errors import ConfigError
from gia_bench.federated.sampling import expected_examples
from gia_bench.federated.work import LocalWork
from gia_bench.seeding import stream


@final
@dataclass(frozen=True, kw_only=True)
class Rounds:
    """Cohorts from ``start`` on, without end: the Trainer's ``max_steps`` ends them."""

    data: FederatedDataModule
    start: int

    def __iter__(self) -> Iterator[Cohort]:
        round_index = self.start
        while True:
            yield self.data.cohort(round_index)
            round_index += 1


@final
@dataclass(frozen=True, kw_only=True)
class TestBatches:
    """The test split in order, as (inputs [n, C, H, W] in [0, 1], labels [n])."""

    dataset: Dataset
    size: int

    def __len__(self) -> int:
        return -(-len(self.dataset.test) // self.size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for indices in torch.split(torch.arange(len(self.dataset.test)), self.size):
            yield self.dataset.test.images(indices), self.dataset.test.labels[indices]


@final
class FederatedDataModule(L.LightningDataModule):
    """Dataset, partition and cohorts. ``start`` is the first round to draw: 0, or where a resumed run goes on.

    Raises ``ConfigError`` when ``clients_per_round`` is more than there are clients.
    """

    def __init__(
        self,
        *,
        dataset: Dataset,
        partition: Partition,
        local: LocalWork,
        clients_per_round: int | None,
        seed: int,
        test_batch_size: int = 500,
    ) -> None:
        super().__init__()
        self.dataset, self.partition, self.local, self.seed = dataset, partition, local, seed
        self.test_batch_size = test_batch_size
        self.start = 0
        available = len(partition.clients)
        # asked here, so that a batch no client can fill is refused before anything is trained
        smallest = min(range(available), key=lambda c: len(partition.clients[c]))
        local.schedule(len(partition.clients[smallest]), seed, 0, smallest)
        self.clients_per_round = available if clients_per_round is None else clients_per_round
        if not 0 < self.clients_per_round <= available:
            raise ConfigError(
                f"fl.clients_per_round={clients_per_round}, but the partition has {available} clients; give a number "
                f"from 1 to {available}, or null for all."
            )

    @property
    def step_sizes(self) -> frozenset[int]:
        """Every number of examples that a local step of some client has, in whatever round it plays."""
        holders = {len(own): client for client, own in enumerate(self.partition.clients)}
        if any((self.local.poisson_rate(held) or 1) < 1 for held in holders):
            return frozenset(range(max(holders) + 1))
        return frozenset(
            len(step) for held, client in holders.items() for step in self.local.schedule(held, self.seed, 0, client)
        )

    def cohort(self, round_index: int) -> Cohort:
        """The clients of a round, drawn without replacement, and the batches of their local steps."""
        everyone = len(self.partition.clients)
        drawn = torch.arange(everyone)
        if self.clients_per_round < everyone:
            drawn = torch.randperm(everyone, generator=stream(self.seed, "cohort", round_index))
        clients = tuple(drawn[: self.clients_per_round].tolist())
        steps, weights, expected = [], [], []
        for client in clients:
            own = self.partition.clients[client]
            chosen = self.local.schedule(len(own), self.seed, round_index, client)
            steps.append(tuple(own[positions] for positions in chosen))
            weights.append(self.local.weight(len(own), chosen))
            rate = self.local.poisson_rate(len(own))
            if rate is not None:
                expected.append(expected_examples(len(own), rate, len(chosen)))
        return Cohort(
            round_index=round_index,
            clients=clients,
            steps=tuple(steps),
            weights=tuple(weights),
            source=self.dataset.train,
            expected=tuple(expected) or None,
        )

    def train_dataloader(self) -> Rounds:
        """One cohort per training step."""
        return Rounds(data=self, start=self.start)

    def val_dataloader(self) -> TestBatches:
        """The whole test split."""
        return TestBatches(dataset=self.dataset, size=self.test_batch_size)
