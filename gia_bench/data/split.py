"""A fixed test split for datasets that come without one."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gia_bench.errors import ConfigError, DataError
from gia_bench.seeding import stream


def stratified(labels: Tensor, test_fraction: float, name: str) -> tuple[Tensor, Tensor]:
    """Train and test indices, each class with its share, the same ones in every run whatever its seed.

    labels: [N] int64; test_fraction: of all examples, rounded up; shares of an example go to the classes with the
    largest remainders. Raises ``ConfigError`` for a fraction outside (0, 1), ``DataError`` where nothing is left.
    """
    if not 0 < test_fraction < 1:
        raise ConfigError(f"dataset.test_fraction={test_fraction} must lie between 0 and 1, both excluded.")
    num_test = math.ceil(test_fraction * len(labels))
    if num_test >= len(labels):
        raise DataError(f"{name} has {len(labels)} images, too few for dataset.test_fraction={test_fraction}.")
    members = [torch.nonzero(labels == c).flatten() for c in torch.unique(labels)]
    generator = stream(0, "split", name)
    members = [m[torch.randperm(len(m), generator=generator)] for m in members]
    exact = [num_test * len(m) / len(labels) for m in members]
    counts = [math.floor(share) for share in exact]
    # a drawn order breaks ties: in a folder with one image per class the first classes would all go to the test
    order = torch.randperm(len(members), generator=generator).tolist()
    order.sort(key=lambda c: counts[c] - exact[c])
    for c in order[: num_test - sum(counts)]:
        counts[c] += 1
    test = torch.cat([m[:n] for m, n in zip(members, counts, strict=True)])
    train = torch.cat([m[n:] for m, n in zip(members, counts, strict=True)])
    return train.sort().values, test.sort().values
