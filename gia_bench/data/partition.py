"""Who holds which examples: every scheme gives disjoint, non-empty clients and is a pure function of its seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gia_bench.errors import ConfigError
from gia_bench.seeding import derive, stream

DRAWS = 1000
"""How often a Dirichlet split is drawn before it counts as impossible."""


@final
@dataclass(frozen=True, eq=False)
class Partition:
    """clients: for each client its examples, int64 indices into the labels that were split, ascending."""

    clients: tuple[Tensor, ...]

    def within(self, indices: Tensor) -> Partition:
        """The same clients as indices into the whole, where only ``labels[indices]`` were split."""
        return Partition(tuple(indices[client] for client in self.clients))


class Scheme(Protocol):
    """A way to spread ``labels`` [N] int64 (and their writers ``groups`` [N], or None) over clients."""

    def split(self, labels: Tensor, groups: Tensor | None, seed: int) -> Partition:
        """Raises ``ConfigError`` where the examples do not suffice."""
        ...


@final
@dataclass(frozen=True, kw_only=True)
class Iid:
    """Examples dealt at random: ``samples_per_client`` to each, or (None) all of them, in equal numbers up to one."""

    num_clients: int
    samples_per_client: int | None = None

    def __post_init__(self) -> None:
        _at_least_one("num_clients", self.num_clients)
        if self.samples_per_client is not None:
            _at_least_one("samples_per_client", self.samples_per_client)

    def split(self, labels: Tensor, groups: Tensor | None, seed: int) -> Partition:
        _enough(len(labels), self.num_clients, self.samples_per_client or 1, "samples_per_client")
        order = torch.randperm(len(labels), generator=stream(seed, "partition", "iid"))
        if self.samples_per_client is not None:
            order = order[: self.num_clients * self.samples_per_client]
        return _partition(order.tensor_split(self.num_clients))


@final
@dataclass(frozen=True, kw_only=True)
class Dirichlet:
    """Each class is spread over the clients in proportions drawn from Dirichlet(alpha, ..., alpha); uses all examples.

    alpha: small is skewed, large is even. Drawn again, at most 1,000 times, until every client has
    ``min_examples``. Source: Yurochkin et al. 2019; Li et al. 2022 (NIID-Bench) with alpha 0.5 and at least 10.
    """

    num_clients: int
    alpha: float
    min_examples: int = 10

    def __post_init__(self) -> None:
        _at_least_one("num_clients", self.num_clients)
        _at_least_one("min_examples", self.min_examples)
        if not 0 < self.alpha < math.inf:
            raise ConfigError(
                f"partition.alpha={self.alpha} must be positive and finite; 0.1 is skewed, 100 nearly even."
            )

    def split(self, labels: Tensor, groups: Tensor | None, seed: int) -> Partition:
        _enough(len(labels), self.num_clients, self.min_examples, "min_examples")
        members = _shuffled_classes(labels, seed)
        generator = np.random.default_rng(derive(seed, "partition", "dirichlet"))
        for _ in range(DRAWS):
            shares = generator.dirichlet([self.alpha] * self.num_clients, size=len(members))
            cuts = [_cuts(share, len(rows)) for share, rows in zip(shares, members, strict=True)]
            sizes = sum(np.diff(cut, prepend=0, append=len(rows)) for cut, rows in zip(cuts, members, strict=True))
            if np.min(sizes) >= self.min_examples:
                pieces = [rows.tensor_split(cut.tolist()) for cut, rows in zip(cuts, members, strict=True)]
                return _partition([torch.cat(of_client) for of_client in zip(*pieces, strict=True)])
        raise ConfigError(
            f"partition.alpha={self.alpha} left a client below {self.min_examples} examples in all of {DRAWS} draws; "
            "raise partition.alpha, or lower partition.num_clients or partition.min_examples."
        )


@final
@dataclass(frozen=True, kw_only=True)
class ClassesPerClient:
    """Each client draws its classes at random and then, per class, a number of examples from ``samples_per_class``.

    samples_per_class: (least, most), both included. A class with too few examples left is not offered any more.
    Source: GradDefense's setting, 100 clients with 2 classes and 1-10 samples of each.
    """

    num_clients: int
    classes_per_client: int
    samples_per_class: Sequence[int]

    def __post_init__(self) -> None:
        _at_least_one("num_clients", self.num_clients)
        _at_least_one("classes_per_client", self.classes_per_client)
        pair = list(self.samples_per_class)
        if len(pair) != 2 or not 1 <= pair[0] <= pair[1]:
            raise ConfigError(f"partition.samples_per_class={pair} must be [least, most] with 1 <= least <= most.")

    def split(self, labels: Tensor, groups: Tensor | None, seed: int) -> Partition:
        left = _shuffled_classes(labels, seed)
        if self.classes_per_client > len(left):
            raise ConfigError(
                f"partition.classes_per_client={self.classes_per_client} is more than the data's {len(left)} classes."
            )
        return _partition(
            [self._take(left, stream(seed, "partition", "client", k), k) for k in range(self.num_clients)]
        )

    def _take(self, left: list[Tensor], generator: torch.Generator, client: int) -> Tensor:
        """One client's examples, removed from ``left``."""
        least, most = self.samples_per_class
        counts = torch.randint(least, most + 1, (self.classes_per_client,), generator=generator).tolist()
        offered = [c for c, rows in enumerate(left) if len(rows) >= max(counts)]
        if len(offered) < self.classes_per_client:
            raise ConfigError(
                f"The data is used up at client {client} of partition.num_clients={self.num_clients}: fewer than "
                f"{self.classes_per_client} classes have {max(counts)} examples left; lower partition.num_clients or "
                "partition.samples_per_class."
            )
        drawn = torch.randperm(len(offered), generator=generator)[: self.classes_per_client].tolist()
        taken = []
        for c, count in zip((offered[i] for i in drawn), counts, strict=True):
            taken.append(left[c][:count])
            left[c] = left[c][count:]
        return torch.cat(taken)


@final
@dataclass(frozen=True, kw_only=True)
class ByWriter:
    """One client per writer (num_clients: None), or whole writers dealt at random to ``num_clients`` clients.

    Source: LEAF for the first, PruneFL for the second (193 writers over 10 clients).
    """

    num_clients: int | None = None

    def __post_init__(self) -> None:
        if self.num_clients is not None:
            _at_least_one("num_clients", self.num_clients)

    def split(self, labels: Tensor, groups: Tensor | None, seed: int) -> Partition:
        if groups is None:
            raise ConfigError(
                "partition=by_writer needs a dataset with writers: choose dataset=femnist, or another partition."
            )
        writers = torch.unique(groups)
        if self.num_clients is None:
            return _partition([torch.nonzero(groups == writer).flatten() for writer in writers])
        if self.num_clients > len(writers):
            raise ConfigError(
                f"partition.num_clients={self.num_clients} is more than the data's {len(writers)} writers; lower it, "
                "or set it to null for one client per writer."
            )
        order = writers[torch.randperm(len(writers), generator=stream(seed, "partition", "writers"))]
        return _partition(
            [torch.nonzero(torch.isin(groups, own)).flatten() for own in order.tensor_split(self.num_clients)]
        )


def _partition(clients: Sequence[Tensor]) -> Partition:
    return Partition(tuple(client.sort().values for client in clients))


def _shuffled_classes(labels: Tensor, seed: int) -> list[Tensor]:
    """The indices of each class that occurs, in a drawn order."""
    generator = stream(seed, "partition", "order")
    members = (torch.nonzero(labels == c).flatten() for c in torch.unique(labels))
    return [rows[torch.randperm(len(rows), generator=generator)] for rows in members]


def _cuts(share: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """Where to cut ``count`` examples so that the pieces have the given shares."""
    return np.floor(np.cumsum(share)[:-1] * count).astype(np.int64)


def _at_least_one(key: str, value: int) -> None:
    if value < 1:
        raise ConfigError(f"partition.{key}={value} must be at least 1.")


def _enough(num_examples: int, num_clients: int, each: int, key: str) -> None:
    if num_clients * each > num_examples:
        raise ConfigError(
            f"partition.num_clients={num_clients} with at least {each} examples each need {num_clients * each}, "
            f"but the data has {num_examples} examples; lower partition.num_clients or partition.{key}."
        )
