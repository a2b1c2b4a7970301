"""Rounding to whole multiples of a unit, so that the multiples and the unit are all that has to travel."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gia_bench.values import Update

_LOW_BITS = 8


def unit_above(step: Tensor) -> Tensor:
    """``step`` (>= 0) rounded up to a float32 of 16 significant bits, at most 2^-15 larger; float32, same shape.

    Multiples up to 255 are then exact in float32, so that the wire can take them apart without loss.
    """
    single = step.float()
    # a step that single precision rounds down must not give a unit that is too small
    single = torch.where(single < step, single.nextafter(torch.full_like(single, torch.inf)), single)
    bits = single.view(torch.int32)
    low = 2**_LOW_BITS - 1
    rounded: Tensor = ((bits + low) & ~low).view(torch.float32)
    return rounded


def on_grid(u: Tensor, unit: Tensor, levels: int, uniform: Tensor | None) -> Tensor:
    """Each entry as the nearest multiple of ``unit``, from -levels to levels, in the dtype of ``u``.

    uniform: numbers in [0, 1) for stochastic rounding, which goes up with the probability of the remainder. An update
    with NaN or infinity becomes NaN as a whole, so that the server sees it.
    """
    unit = unit.to(u.dtype)
    multiples = torch.where(unit > 0, u / unit, 0)
    whole = multiples.round() if uniform is None else (multiples + uniform.to(u.device, u.dtype)).floor()
    # adding 0 turns -0.0 into 0.0
    return (whole.clamp(-levels, levels) + 0.0) * unit


def straight_through(update: Update, rounding: Callable[[Update], Update]) -> Update:
    """The rounded update, with the gradient of the one that is not (Bengio et al. 2013): rounding passes none."""
    plain = {name: u.detach() for name, u in update.items()}
    rounded = rounding(plain)
    return {name: u + (rounded[name] - plain[name]) for name, u in update.items()}


def euclidean(update: Update) -> dict[str, Tensor]:
    """Each tensor's Euclidean norm, in double: there the order of a sum does not show in single precision."""
    return {name: u.double().square().sum().sqrt() for name, u in update.items()}
