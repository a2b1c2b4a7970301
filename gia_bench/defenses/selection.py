"""Which entries of an update are kept, by the rank of their magnitude. Linear in the number of entries.

Rank 1 is the largest magnitude; equal magnitudes rank by position, the lowest index first (in global scope tensors
stand in the update's order). -0.0 equals 0.0; NaN ranks above infinity.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import TypeAlias

import torch
from torch import Tensor

from gia_bench.defenses.checks import check
from gia_bench.errors import ConfigError, IncompatibleError, choices
from gia_bench.rows import cut, joined
from gia_bench.values import Update
from gia_bench.wire import bits_of

Mask: TypeAlias = dict[str, Tensor]
"""bool, by parameter name, of the parameter's shape."""

SCOPES = ("tensor", "global")


def band(update: Update, k1: Fraction, k2: Fraction, scope: str) -> Mask:
    """Keeps the ranks between the share k1 of the largest entries and the share k2 of the smallest.

    Of n entries (of a tensor, or of all tensors together) the first floor(k1 n) ranks are dropped and the next
    n - floor((k1 + k2) n) are kept: at least one of every tensor. The number kept depends on k1 + k2 alone, so Top-k
    and DGP of the same share send the same number of entries.
    """
    if scope == "tensor":
        return {name: _band(u.reshape(-1), k1, k2).reshape(u.shape) for name, u in update.items()}
    return cut(_band(joined(update), k1, k2), update)


def _band(entries: Tensor, k1: Fraction, k2: Fraction) -> Tensor:
    n = entries.numel()
    dropped = math.floor(k1 * n)
    kept = n - math.floor((k1 + k2) * n)
    # the bits of non-negative floats order like the floats, and unlike them order NaN
    return ranks(bits_of(entries.abs()), dropped, dropped + kept)


def ranks(magnitudes: Tensor, start: int, stop: int) -> Tensor:
    """True for ``stop - start`` of the integers [n]: all but the ``start`` largest of the ``stop`` largest."""
    largest = magnitudes.topk(stop, sorted=False).values if stop < magnitudes.numel() else magnitudes
    return _first(magnitudes, largest, stop) & ~_first(magnitudes, largest, start)


def _first(magnitudes: Tensor, largest: Tensor, count: int) -> Tensor:
    """True for the ``count`` largest, all of which are among the values ``largest``."""
    if count == 0:
        return torch.zeros_like(magnitudes, dtype=torch.bool)
    if count == magnitudes.numel():
        return torch.ones_like(magnitudes, dtype=torch.bool)
    smallest = (largest.topk(count, sorted=False).values if count < largest.numel() else largest).amin()
    above, equal = magnitudes > smallest, magnitudes == smallest
    room = count - above.count_nonzero()
    return above | (equal & (equal.cumsum(0, dtype=torch.int32) <= room))


def on_support(update: Update, pattern: Update) -> Update:
    """``update`` where ``pattern`` is not zero, 0 elsewhere; differentiable in ``update``."""
    return restricted(update, {name: pattern[name] != 0 for name in update})


def restricted(update: Update, mask: Mask) -> Update:
    """``update`` where ``mask`` is set, 0 elsewhere."""
    return {name: torch.where(mask[name], u, 0) for name, u in update.items()}


def violation(update: Update, observed: Update, k1: Fraction, scope: str) -> Tensor:
    """The squared distance of ``update``, on the entries that are 0 in ``observed``, to what a band can have withheld.

    Of the withheld entries of a tensor (or of all tensors) the floor(k1 n) largest are at least as large as the largest
    observed one, the others at most as large as the smallest. An observed update without any entry gives 0.
    """
    update = {name: u for name, u in update.items() if u.numel()}
    names = [[name] for name in update] if scope == "tensor" else [list(update)]
    rows = [[joined(u, some) for u in (update, observed)] for some in names]
    return torch.stack([_violation(dummy, seen, math.floor(k1 * dummy.numel())) for dummy, seen in rows]).sum()


def _violation(dummy: Tensor, seen: Tensor, count: int) -> Tensor:
    missing, size = seen == 0, dummy.abs()
    largest, smallest = seen.abs().amax(), torch.where(missing, torch.inf, seen.abs()).amin()
    top = ranks(bits_of(torch.where(missing, size.detach(), 0)), 0, count) if count else torch.zeros_like(missing)
    wrong = torch.where(top, (largest - size).clamp(min=0), (size - smallest).clamp(min=0))
    return torch.where(missing & smallest.isfinite(), wrong, 0).square().sum()


def exact(share: float) -> Fraction:
    """The fraction that was meant: 0.05 is 1/20, so that floor(0.05 * 20) is 1 and 0.05 + 0.95 is 1."""
    return Fraction(share).limit_denominator(10**9)


def check_band(name: str, k1: float, k2: float, scope: str) -> None:
    """Raises ``ConfigError`` unless k1, k2 and k1 + k2 lie in [0, 1) and the scope exists."""
    for key, share in (("k1", k1), ("k2", k2)):
        check(f"defense {name}: {key}", share, lambda s: 0 <= s < 1, "lie in [0, 1); it is a share, 0.05 means 5 %")
    if exact(k1) + exact(k2) >= 1:
        raise IncompatibleError(
            f"defense {name}: k1 + k2 = {k1} + {k2} drops every entry; lower one of them until the sum is below 1."
        )
    check_scope(name, scope)


def check_scope(name: str, scope: str) -> None:
    """Raises ``ConfigError`` for a scope that does not exist."""
    if scope not in SCOPES:
        raise ConfigError(choices(f"defense {name}: scope", scope, SCOPES))
