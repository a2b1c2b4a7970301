"""The axes of an attack's tensors: V victims, T restarts of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils._pytree import tree_map


def mapped_over(size: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` for every row of its arguments. An axis of one is not mapped: every layer of vmap takes time with
    every operation, and below none a wide network's kernels are faster."""
    if size > 1:
        return vmap(function)
    return lambda *rows: tree_map(lambda t: t[None], function(*tree_map(lambda t: t[0], rows)))


def stack(dicts: Sequence[Mapping[str, Tensor]], device: torch.device) -> dict[str, Tensor]:
    """What every victim has by the same name, on a first axis."""
    return {k: torch.stack([d[k].detach().to(device) for d in dicts]) for k in dicts[0]}


def chunks(V: int, T: int, max_batch: int | None) -> list[tuple[slice, slice]]:
    """Whole victims where their restarts fit, so that a target is used by all restarts at once; else single victims."""
    size = max_batch or V * T
    rows, columns = max(size // T, 1), min(T, size)
    return [(slice(v, v + rows), slice(t, t + columns)) for v in range(0, V, rows) for t in range(0, T, columns)]
