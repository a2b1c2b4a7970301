"""Pruning by percentile, by chance and by value: the controls of Top-k and DGP."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from gia_bench.defenses.checks import check
from gia_bench.defenses.feedback import ErrorFeedback, Select
from gia_bench.defenses.selection import Mask, exact
from gia_bench.defenses.withholding import Withholding
from gia_bench.values import Batch, Noise, Params, Shared, Update
from gia_bench.wire import bits_of

FORGETS = ErrorFeedback(enabled=False)


@final
@dataclass(frozen=True, kw_only=True)
class GradientCompression(Withholding):
    """GC: entries below the ``prune`` percentile of their tensor's magnitudes are zeroed, everything else is sent.

    prune: share in [0, 1). The percentile is numpy's (linear interpolation), as in the code of Soteria, GGL,
    GradDefense and Plato: of n distinct magnitudes the ceil(prune (n - 1)) smallest go; equal ones go or stay together,
    which is where it differs from ``TopK``. The papers use it without error feedback.
    """

    prune: float = 0.8
    error_feedback: ErrorFeedback = FORGETS

    def __post_init__(self) -> None:
        check(
            "defense gradient_compression: prune", self.prune, lambda s: 0 <= s < 1,
            "lie in [0, 1); it is a share, 0.8 means 80 %",
        )  # fmt: skip

    def choice(self, shared: Shared, noise: Noise) -> Select:
        """``select``."""
        return self.select

    def select(self, update: Update) -> Mask:
        """True where an entry is sent."""
        return {name: self._above(u) for name, u in update.items()}

    def _above(self, u: Tensor) -> Tensor:
        n = u.numel()
        if n == 0:
            return torch.zeros_like(u, dtype=torch.bool)
        # between two neighbours the percentile prunes the lower one, so it is their upper one that decides
        kept = n - math.ceil(exact(self.prune) * (n - 1))
        magnitudes = bits_of(u.abs())  # these order like the floats, and unlike them order NaN
        return magnitudes >= magnitudes.reshape(-1).topk(kept, sorted=False).values.amin()


@final
@dataclass(frozen=True, kw_only=True)
class RandomK(Withholding):
    """A random share of every tensor's entries, newly drawn by each client in each round (Stich et al. 2018).

    keep: share in (0, 1]; ceil(keep n) of n entries are sent, at least one of every tensor, as many as by ``TopK``.
    """

    keep: float = 0.2

    def __post_init__(self) -> None:
        check("defense random_k: keep", self.keep, lambda s: 0 < s <= 1, "lie in (0, 1]; it is a share, 0.2 means 20 %")

    def draw(self, like: Params, batch: Batch, generator: torch.Generator) -> Noise:
        """Which entries are sent: bool, by parameter name."""

        def chosen(param: Tensor) -> Tensor:
            n = param.numel()
            mask = torch.zeros(n, dtype=torch.bool)
            mask[torch.randperm(n, generator=generator)[: math.ceil(exact(self.keep) * n)]] = True
            return mask.view(param.shape)

        return {name: chosen(param) for name, param in like.items()}

    def choice(self, shared: Shared, noise: Noise) -> Select:
        """The drawn entries."""
        return lambda full: {name: noise[name] for name in full}


@final
@dataclass(frozen=True, kw_only=True)
class Threshold(Withholding):
    """Entries whose magnitude is at least ``value``, in the update's units (Strom 2015, without its quantization)."""

    value: float = 1e-3

    def __post_init__(self) -> None:
        check("defense threshold: value", self.value, lambda v: 0 <= v < math.inf, "be finite and at least 0")

    def choice(self, shared: Shared, noise: Noise) -> Select:
        """``select``."""
        return self.select

    def select(self, update: Update) -> Mask:
        """True where an entry is sent."""
        return {name: u.abs() >= self.value for name, u in update.items()}
