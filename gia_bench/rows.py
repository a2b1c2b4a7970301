"""Tensors by name as rows of numbers, and back: an operation takes its time however few the numbers are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor

Tensors: TypeAlias = Mapping[str, Tensor]


def joined(tensors: Tensors, names: Iterable[str] | None = None) -> Tensor:
    """The entries [P] of all tensors, or of those that are named, in this order."""
    return torch.cat([tensors[name].reshape(-1) for name in (tensors if names is None else names)])


def cut(row: Tensor, like: Tensors) -> dict[str, Tensor]:
    """A row [P] by the names and in the shapes of ``like``; views, of the row's dtype."""
    parts = row.split_with_sizes([t.numel() for t in like.values()])
    return {name: part.view(t.shape) for part, (name, t) in zip(parts, like.items(), strict=True)}
