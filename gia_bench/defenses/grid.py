"""Rounding to whole multiples of a unit, so that the multiples and the unit are all that has to travel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from gia_bench.rows import joined
from gia_bench.values import Noise, Update

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


def on_grid(update: Update, steps: Tensor, levels: int, noise: Noise) -> Update:
    """Each entry as the nearest multiple of its tensor's unit, from -levels to levels, in its dtype.

    steps: [tensors], of which the units are ``unit_above``. noise: empty, or numbers in [0, 1) for stochastic rounding,
    which goes up with the probability of the remainder. A tensor with NaN or infinity becomes NaN as a whole, so that
    the server sees it.
    """
    # for all tensors at once: an operation takes its time however few the numbers
    units = {dtype: unit_above(steps).to(dtype) for dtype in {u.dtype for u in update.values()}}
    # a tensor of zeros has the unit 0, and in half precision one of very small numbers
    divisors = {dtype: torch.where(unit > 0, unit, 1) for dtype, unit in units.items()}

    def multiples(u: Tensor, divisor: Tensor, uniform: Tensor | None) -> Tensor:
        if uniform is None:
            # adding 0 turns -0.0 into 0.0
            return (u / divisor).round() + 0.0
        return torch.addcdiv(uniform.to(u.device, u.dtype), u, divisor).floor()

    return {
        name: multiples(u, divisors[u.dtype][i], noise.get(name)).clamp(-levels, levels) * units[u.dtype][i]
        for i, (name, u) in enumerate(update.items())
    }


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
        away = {k: (dummy[k] - observed[k]).abs() / unit for k, unit in units.items()}
        return _nats(joined(away)).sum()

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
