"""The strong-Wolfe line search of ``torch.optim.LBFGS``, for many candidates at once.

N searches run side by side, each at its own stage: first it looks for two lengths with a good one between them, by
steps that grow (bracketing), then it narrows these down by cubic interpolation (zooming); Nocedal and Wright 2006,
algorithms 3.5 and 3.6. One evaluation of all the candidates moves every search on by one trial; masks say which stage
a search is in, so that nothing waits for the device.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

DECREASE, CURVATURE = 1e-4, 0.9
"""The two constants of the Wolfe conditions, torch's."""

T = TypeVar("T", bound=tuple[Any, ...])


class Points(NamedTuple):
    """A place on each of the N lines: length [N], loss [N], slope along the direction [N], gradient [N, n]."""

    length: Tensor
    loss: Tensor
    slope: Tensor
    gradient: Tensor


class Searches(NamedTuple):
    """Where N line searches stand.

    trial: [N] length that is evaluated next; tries: [N] int64 trials that were evaluated; budget: [N] int64 trials
    allowed after the first; origin: where the line starts; reach: [N] largest absolute entry of the direction;
    first, second: the two ends (while bracketing, ``first`` is the trial before); second_is_low: [N] bool, which end
    has the lower loss; zooming, stuck: [N] bool, the stage, and whether the last trial was close to an end.
    """

    trial: Tensor
    tries: Tensor
    budget: Tensor
    origin: Points
    reach: Tensor
    first: Points
    second: Points
    second_is_low: Tensor
    zooming: Tensor
    stuck: Tensor

    @classmethod
    def begin(cls, trial: Tensor, budget: Tensor, loss: Tensor, gradient: Tensor, direction: Tensor) -> Searches:
        """Searches from here along ``direction`` [N, n]; ``trial`` [N]: the first lengths."""
        origin = Points(torch.zeros_like(trial), loss, (gradient * direction).sum(1), gradient)
        no = torch.zeros_like(trial, dtype=torch.bool)
        return cls(
            trial=trial,
            tries=torch.zeros_like(budget),
            budget=budget,
            origin=origin,
            reach=direction.abs().amax(1),
            first=origin,
            second=origin,
            second_is_low=no,
            zooming=no,
            stuck=no,
        )

    @property
    def low(self) -> Points:
        """The end with the lower loss: a finished search's result."""
        return choose(self.second_is_low, self.second, self.first)

    def receive(self, new: Points, tolerance_change: float) -> tuple[Searches, Tensor]:
        """``new``: what the trials gave. Returns the searches after it and who has finished, [N] bool."""
        origin, zooming, spent = self.origin, self.zooming, self.tries >= self.budget
        high_up = new.loss > origin.loss + DECREASE * new.length * origin.slope
        flat = new.slope.abs() <= -CURVATURE * origin.slope

        beyond = ~zooming & ~spent & (high_up | ((self.tries > 1) & (new.loss >= self.first.loss)))
        hit = ~zooming & ~spent & ~beyond & flat
        enclosed = beyond | (~zooming & ~spent & ~hit & (new.slope >= 0))
        onward = ~zooming & ~spent & ~hit & ~enclosed
        longer = _cubic(self.first, new, new.length + 0.01 * (new.length - self.first.length), 10 * new.length)

        low, high = self.low, choose(self.second_is_low, self.first, self.second)
        worse = high_up | (new.loss >= low.loss)
        turned = ~worse & ~flat & (new.slope * (high.length - low.length) >= 0)
        high = choose(worse, new, choose(turned, low, high))
        low = choose(worse, low, new)

        # without an end in sight, the result is the better one of the start and the last trial
        first = choose(onward | hit, new, choose(spent, origin, self.first))
        first = choose(zooming, choose(self.second_is_low, high, low), first)
        second = choose(zooming, choose(self.second_is_low, low, high), new)
        # written as a negation: a loss that is not a number counts as the lower one, as in torch
        ordered = ~(first.loss <= second.loss)
        second_is_low = torch.where(zooming & ~worse, self.second_is_low, ordered)

        narrow = (second.length - first.length).abs() * self.reach < tolerance_change
        finished = spent | hit | (zooming & ~worse & flat) | ((zooming | enclosed) & narrow)
        between, stuck = _between(first, second, self.stuck)
        after = self._replace(
            trial=torch.where(onward, longer, between),
            tries=self.tries + 1,
            first=first,
            second=second,
            second_is_low=second_is_low,
            zooming=zooming | enclosed,
            stuck=stuck & ~onward,
        )
        return after, finished


def choose(where: Tensor, yes: T, no: T) -> T:
    """``yes`` for the candidates with ``where`` [N], else ``no``; tuples of tensors [N, ...], or of such tuples."""

    def one(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(where.view(-1, *[1] * (a.ndim - 1)), a, b)

    parts = zip(yes, no, strict=True)
    return type(yes)(*(one(a, b) if isinstance(a, Tensor) else choose(where, a, b) for a, b in parts))


def _between(first: Points, second: Points, stuck: Tensor) -> tuple[Tensor, Tensor]:
    """The next trial between two ends, and whether it is close to one. The second time in a row, or on an end itself,
    it is moved a tenth of the way inwards.
    """
    bottom, top = torch.minimum(first.length, second.length), torch.maximum(first.length, second.length)
    trial, margin = _cubic(first, second, bottom, top), 0.1 * (top - bottom)
    close = torch.minimum(top - trial, trial - bottom) < margin
    moved = close & (stuck | (trial >= top) | (trial <= bottom))
    inside = torch.where((trial - top).abs() < (trial - bottom).abs(), top - margin, bottom + margin)
    return torch.where(moved, inside, trial), close & ~moved


def _cubic(a: Points, b: Points, bottom: Tensor, top: Tensor) -> Tensor:
    """Where the cubic through two points with their slopes is lowest, within [bottom, top]; the middle if nowhere."""
    swap = a.length > b.length
    x1, f1, g1 = (torch.where(swap, q, p) for p, q in zip(a[:3], b[:3], strict=True))
    x2, f2, g2 = (torch.where(swap, p, q) for p, q in zip(a[:3], b[:3], strict=True))
    d1 = g1 + g2 - 3 * (f1 - f2) / (x1 - x2)
    square = d1**2 - g1 * g2
    d2 = square.clamp(min=0).sqrt()
    lowest = x2 - (x2 - x1) * ((g2 + d2 - d1) / (g2 - g1 + 2 * d2))
    # comparisons instead of clamp: what is not a number stays one, as in torch
    lowest = torch.where(bottom > lowest, bottom, lowest)
    lowest = torch.where(top < lowest, top, lowest)
    return torch.where(square >= 0, lowest, (bottom + top) / 2)
