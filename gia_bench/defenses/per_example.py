"""Random numbers for each example of a client's local steps, the same however much padding a chunk brings."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gia_bench.values import Noise


def per_example(mask: Tensor, draw: Callable[[int], Noise], elsewhere: dict[str, float]) -> Noise:
    """``draw(n)`` gives tensors [n, ...] for the n real examples of a step; here they become [S, B, ...] on the CPU.

    mask: [S, B]; elsewhere: what stands at padding, by the tensors' names. Padding draws nothing: a chunk of larger
    clients, which brings more of it, leaves every number as it is.
    """
    real = mask.cpu() > 0
    empty = draw(0)
    whole = {k: torch.full((*real.shape, *v.shape[1:]), elsewhere[k], dtype=v.dtype) for k, v in empty.items()}
    for step, rows in enumerate(real):
        count = int(rows.sum())
        for name, values in (draw(count) if count else empty).items():
            whole[name][step, rows] = values
    return whole
