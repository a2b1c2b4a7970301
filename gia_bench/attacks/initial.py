"""Where a search starts, in the searched coordinates (normalised pixels)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias, final

import torch
from torch import Tensor

from gia_bench.attacks.checks import check

Initial: TypeAlias = Callable[[Sequence[int], torch.Generator, torch.dtype], Tensor]
"""(shape, generator on the CPU, dtype) -> a first guess on the CPU."""


@final
@dataclass(frozen=True)
class Randn:
    """Standard normal (Zhu et al. 2019, Geiping et al. 2020)."""

    def __call__(self, shape: Sequence[int], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
        return torch.randn(tuple(shape), generator=generator, dtype=dtype)


@final
@dataclass(frozen=True, kw_only=True)
class Uniform:
    """Uniform in [low, high)."""

    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        check(self.low < self.high, "uniform.low", self.low, f"a number below high={self.high}")

    def __call__(self, shape: Sequence[int], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
        return self.low + (self.high - self.low) * torch.rand(tuple(shape), generator=generator, dtype=dtype)


@final
@dataclass(frozen=True)
class Zeros:
    """All zeros: the mean image of the data, where the victim normalises. All restarts are the same."""

    def __call__(self, shape: Sequence[int], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
        return torch.zeros(tuple(shape), dtype=dtype)
