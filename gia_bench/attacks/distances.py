"""How far one dummy update is from the observed one. Each is written for one pair and mapped over candidates; some
also take many pairs as they are (``OfMany``).

The observed update names the tensors that count: a threat model (or a wrapping distance) that shows fewer layers passes
fewer tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gia_bench.rows import joined
from gia_bench.values import Update

Distance: TypeAlias = Callable[[Update, Update], Tensor]
"""(dummy update, observed update) -> scalar, 0 where they agree. Twice differentiable in the first."""


class OfMany(Protocol):
    """A distance that also takes many pairs at once."""

    def of_many(self, dummies: Update, observed: Update) -> Tensor:
        """dummies [V, T, ...] and observed [V, ...] -> [V, T]. Differentiable once, which is all that is asked where
        the dummies are gradients already."""
        ...


@final
@dataclass(frozen=True)
class Euclidean:
    """The sum of squared differences over all tensors (Zhu et al. 2019, DLG)."""

    def __call__(self, dummy: Update, observed: Update) -> Tensor:
        return _sum((a - b).square().sum() for a, b in _pieces(dummy, observed))


@final
@dataclass(frozen=True)
class EuclideanMean:
    """The squared difference averaged over all entries of the update: Euclidean / P (gia_bench choice)."""

    def __call__(self, dummy: Update, observed: Update) -> Tensor:
        total = _sum((a - b).square().sum() for a, b in _pieces(dummy, observed))
        return total / sum(t.numel() for t in observed.values())


@final
@dataclass(frozen=True)
class L1:
    """The sum of absolute differences over all tensors."""

    def __call__(self, dummy: Update, observed: Update) -> Tensor:
        return _sum((a - b).abs().sum() for a, b in _pieces(dummy, observed))


@final
@dataclass(frozen=True)
class Cosine(OfMany):
    """1 - the cosine of the angle between the updates, all tensors as one vector; in [0, 2] (Geiping et al. 2020)."""

    def __call__(self, dummy: Update, observed: Update) -> Tensor:
        # u * u: the derivatives of square() take longer
        products = ([a * b, a * a, b * b] for a, b in _pieces(dummy, observed))
        dot, own, seen = (_sum(p.sum() for p in one) for one in zip(*products, strict=True))
        return 1 - _over_norms(dot, own, seen)

    def of_many(self, dummies: Update, observed: Update) -> Tensor:
        """The same, in half the time."""
        V, T = next(iter(dummies.values())).shape[:2]
        own = torch.cat([dummies[k].reshape(V, T, -1) for k in observed], dim=2)
        seen = torch.cat([u.reshape(V, 1, -1) for u in observed.values()], dim=2)
        cosines: Tensor = _Cosines.apply(own, seen)
        return 1 - cosines


@final
@dataclass(frozen=True)
class LayerCosine:
    """The mean over the tensors of ``Cosine``, so that every tensor has the same say."""

    def __call__(self, dummy: Update, observed: Update) -> Tensor:
        cosines = (
            _over_norms((dummy[k] * observed[k]).sum(), dummy[k].square().sum(), observed[k].square().sum())
            for k in observed
        )
        return 1 - _sum(cosines) / len(observed)


@final
@dataclass(frozen=True)
class Angular:
    """The angle between the updates, all tensors as one vector, divided by pi; in [0, 1].

    Read off the sum and the difference of the unit vectors: the arc cosine has no derivative where they agree.
    """

    def __call__(self, dummy: Update, observed: Update) -> Tensor:
        tiny = torch.finfo(next(iter(observed.values())).dtype).tiny
        a, b = ({k: u[k] / _norm(u[k] for k in observed) for k in observed} for u in (dummy, observed))
        apart, together = (_sum((a[k] + s * b[k]).square().sum() for k in observed) for s in (-1, 1))
        return torch.atan2(apart.clamp(min=tiny).sqrt(), together.clamp(min=tiny).sqrt()) * (2 / math.pi)


@final
class _Cosines(torch.autograd.Function):
    """[..., P], [..., P] -> [...]: the cosines between last axes, and their slope by the first of both in two passes
    over it, where autograd would take five."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, seen: Tensor) -> Tensor:
        least = torch.finfo(own.dtype).tiny ** 0.5
        lengths = [torch.linalg.vector_norm(t, dim=-1).clamp(min=least) for t in (own, seen)]
        cosines: Tensor = (own * seen).sum(-1) / lengths[0] / lengths[1]
        ctx.save_for_backward(own, seen, cosines, *lengths)
        return cosines

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        own, seen, cosines, own_length, seen_length = ctx.saved_tensors
        towards, back = slope / own_length / seen_length, -slope * cosines / own_length / own_length
        return (seen * towards[..., None]).addcmul_(own, back[..., None]), None


SMALL = 4096
"""Entries of a tensor up to which it is not worth an operation of its own (measured on DLG's LeNet)."""


def _pieces(dummy: Update, observed: Update) -> list[tuple[Tensor, Tensor]]:
    """Both updates, piece by piece: each large tensor, and all small ones as one row. However few the numbers, an
    operation takes its time, and a distance asks for a dozen of every piece."""
    small = [name for name, t in observed.items() if t.numel() <= SMALL]
    large = [(dummy[name], t) for name, t in observed.items() if name not in small]
    return [*large, (joined(dummy, small), joined(observed, small))] if small else large


def _norm(tensors: Iterable[Tensor]) -> Tensor:
    square = _sum(t.square().sum() for t in tensors)
    return square.clamp(min=torch.finfo(square.dtype).tiny).sqrt()


def _sum(values: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(values)).sum()


def _over_norms(dot: Tensor, square1: Tensor, square2: Tensor) -> Tensor:
    """A zero update (everything was pruned) gives 0, and no NaN in the gradient: it says nothing and breaks nothing."""
    tiny = torch.finfo(dot.dtype).tiny
    return dot / (square1.clamp(min=tiny).sqrt() * square2.clamp(min=tiny).sqrt())
