"""Tensors by name as rows of numbers, and back: an operation takes its time however few the numbers are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import torch
from torch import Tensor

Tensors: TypeAlias = Mapping[str, Tensor]

SMALL = 4096
"""Entries of a tensor up to which it is not worth an operation of its own (measured on DLG's LeNet)."""


def joined(tensors: Tensors) -> Tensor:
    """All entries [P] in the order of the names."""
    return torch.cat([t.reshape(-1) for t in tensors.values()])


def cut(row: Tensor, like: Tensors) -> dict[str, Tensor]:
    """A row [P] by the names and in the shapes of ``like``; views, of the row's dtype."""
    parts = row.split_with_sizes([t.numel() for t in like.values()])
    return {name: part.view(t.shape) for part, (name, t) in zip(parts, like.items(), strict=True)}


def pieces(*inputs: Tensors) -> list[tuple[Tensor, ...]]:
    """Tensors of the same names and shapes side by side: each large one, and after them all small ones as one row."""
    small = [name for name, t in inputs[0].items() if t.numel() <= SMALL]
    parts = [tuple(tensors[name] for tensors in inputs) for name in inputs[0] if name not in small]
    return [*parts, tuple(joined({name: t[name] for name in small}) for t in inputs)] if small else parts
