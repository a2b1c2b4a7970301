"""An update of any size as a vector of fixed length."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from gia_bench.seeding import stream
from gia_bench.values import Update


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class Sketch:
    """Feature hashing: every entry of the update belongs to one of ``size`` buckets and adds to it with a random sign.

    Inner products are kept in expectation (Weinberger et al. 2009). Wu et al. 2023 hash the updates of large models;
    that all buckets hold equally many entries (or one fewer), and that tensors are first brought to one scale, are
    gia_bench choices: the first makes the sum the same on every device, and without the second the last layer's entries
    drown the others'. Without a size the update stays as it is.

    scales: by the names of the tensors that count, what their entries are divided by; places: [size, entries of a
    bucket] positions in the flat update, signs: the same shape, 0 for none.
    """

    scales: dict[str, Tensor]
    places: Tensor | None
    signs: Tensor | None

    @classmethod
    def of(cls, pilot: Update, size: int | None, *, scaled: bool, seed: int) -> Sketch:
        """For updates like those of ``pilot`` [n, ...], whose root mean square is each tensor's scale if ``scaled``."""
        some = next(iter(pilot.values()))
        roots = {k: v.square().mean().sqrt() for k, v in pilot.items()}
        # a tensor that nobody sends has no scale, and stays zero with any
        scales = {k: torch.where(r > 0, r, 1) if scaled else torch.ones_like(r) for k, r in roots.items()}
        if size is None:
            return cls(scales=scales, places=None, signs=None)
        entries = sum(v[0].numel() for v in pilot.values())
        depth = math.ceil(entries / size)
        draw = stream(seed, "sketch", entries, size)
        order = torch.randperm(entries, generator=draw)
        signs = torch.randint(2, (entries,), generator=draw) * 2.0 - 1
        missing = (0, size * depth - entries)
        order, signs = (torch.nn.functional.pad(t, missing) for t in (order, signs))
        # column by column, so that what is missing is spread over the buckets
        return cls(
            scales=scales,
            places=order.view(depth, size).T.contiguous().to(some.device),
            signs=signs.view(depth, size).T.contiguous().to(some),
        )

    def __call__(self, updates: Update) -> Tensor:
        """[n, size] from updates [n, ...]."""
        flat = torch.cat([updates[k].reshape(len(updates[k]), -1) / scale for k, scale in self.scales.items()], 1)
        if self.places is None or self.signs is None:
            return flat
        total = torch.zeros(len(flat), len(self.places), dtype=flat.dtype, device=flat.device)
        for column in range(self.places.shape[1]):
            total += flat[:, self.places[:, column]] * self.signs[:, column]
        return total
