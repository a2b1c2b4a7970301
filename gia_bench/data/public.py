"""Public examples: of the same kind as the clients', and held by none of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from gia_bench.data.partition import Partition
from gia_bench.data.source import Dataset
from gia_bench.errors import ConfigError, IncompatibleError, choices
from gia_bench.values import Examples

SPLITS = ("test", "train")


@final
@dataclass(frozen=True, eq=False)
class Subset:
    """Some examples of a split: ``rows`` [N] int64 are their places in it."""

    whole: Examples
    rows: Tensor

    @property
    def labels(self) -> Tensor:
        """[N] int64."""
        return self.whole.labels[self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def images(self, indices: Tensor) -> Tensor:
        """Images [n, C, H, W], float32 in [0, 1], for ``indices`` [n] int64 among these examples."""
        return self.whole.images(self.rows[indices])


def public_examples(
    dataset: Dataset, partition: Partition, *, split: str = "test", indices: Sequence[int] | None = None
) -> Examples:
    """What root sets are drawn from, and what attackers with auxiliary data train on.

    split: "test" (no weight of a federation is ever trained on it), or "train": what no client holds of it; indices:
    positions in that split, None for all that are free. Raises ``IncompatibleError`` where ``indices`` name an example
    that a client holds, or none is free, and ``ConfigError`` for a split or position that does not exist.
    """
    if split not in SPLITS:
        raise ConfigError(choices("public.split", split, SPLITS))
    source = dataset.test if split == "test" else dataset.train
    held = torch.cat(list(partition.clients)) if split == "train" else torch.empty(0, dtype=torch.int64)
    if indices is None:
        rows = torch.arange(len(source))
        rows = rows[~torch.isin(rows, held)]
    else:
        rows = torch.tensor(list(indices), dtype=torch.int64)
        if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < len(source):
            raise ConfigError(f"public.indices must lie in 0..{len(source) - 1}, the {split} split of {dataset.name}.")
        overlap = rows[torch.isin(rows, held)]
        if len(overlap):
            raise IncompatibleError(
                f"public.indices name {len(overlap)} training example(s) that a client holds (the first is "
                f"{int(overlap[0])}): they would not be public. Leave public.indices=null for those that are free, or "
                "take public.split=test."
            )
    if not len(rows):
        raise IncompatibleError(
            f"Nothing of the {split} split of {dataset.name} is public: clients hold all of it. Take "
            "public.split=test, or give the clients less with partition.samples_per_client."
        )
    return Subset(source, rows)
