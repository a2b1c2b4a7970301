"""Rounding to whole multiples of a unit, so that the multiples and the unit are all that has to travel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from gia_bench.values import Update

_LOW_BITS = 8

EDGE = 0.999
"""Of a unit: how far an entry may be from what it was rounded to before ``ByChance`` goes on along the tangent."""


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


def units_above(steps: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``unit_above`` of every tensor's step (scalars) at once: an operation takes its time however few the numbers."""
    if len({step.dtype for step in steps.values()}) != 1:
        return {name: unit_above(step) for name, step in steps.items()}
    return dict(zip(steps, unit_above(torch.stack(list(steps.values()))).unbind(), strict=True))


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


@final
@dataclass(frozen=True)
class ByChance:
    """The law of stochastic rounding: v becomes the multiple m of a unit with probability 1 - |v - m| / unit.

    The unit is read off what was sent. top: the multiple to which the largest magnitude belongs (None: the smallest one
    above 0 is the unit, or a whole multiple of it where no entry was rounded to one unit); shared: one unit for all
    tensors. Beyond ``EDGE`` of a unit, where the probability goes to 0, the surprise goes on along its tangent, so that
    guesses far away have a slope (gia_bench choice).
    """

    top: int | None = None
    shared: bool = False

    def surprise(self, dummy: Update, observed: Update) -> Tensor:
        """The sum of -log(1 - |v - m| / unit); a tensor of which nothing but zeros was sent says nothing."""
        units = self._units(observed)
        away = torch.cat([((dummy[k] - observed[k]).abs() / unit).flatten() for k, unit in units.items()])
        return _nats(away).sum()

    def _units(self, observed: Update) -> dict[str, Tensor]:
        """Of every tensor that has entries."""
        units = {k: self._unit(o) for k, o in observed.items() if o.numel()}
        if not self.shared:
            return units
        known = torch.stack([*units.values()])
        if self.top is None:
            return dict.fromkeys(units, known.amin())
        largest = torch.where(known < torch.inf, known, 0).amax()
        return dict.fromkeys(units, torch.where(largest > 0, largest, torch.inf))

    def _unit(self, sent: Tensor) -> Tensor:
        """Infinite where nothing but zeros was sent."""
        sizes = sent.abs()
        if self.top is not None:
            largest = sizes.amax()
            return torch.where(largest > 0, largest / self.top, torch.inf)
        return torch.where(sizes > 0, sizes, torch.inf).amin()


def _nats(away: Tensor) -> Tensor:
    inside = -torch.log1p(-away.clamp(max=EDGE))
    return inside + (away - EDGE).clamp(min=0) / (1 - EDGE)


def straight_through(update: Update, rounding: Callable[[Update], Update]) -> Update:
    """The rounded update, with the gradient of the one that is not (Bengio et al. 2013): rounding passes none."""
    plain = {name: u.detach() for name, u in update.items()}
    rounded = rounding(plain)
    return {name: u + (rounded[name] - plain[name]) for name, u in update.items()}


def euclidean(update: Update) -> dict[str, Tensor]:
    """Each tensor's Euclidean norm, in double: there the order of a sum does not show in single precision."""
    return {name: u.double().square().sum().sqrt() for name, u in update.items()}
