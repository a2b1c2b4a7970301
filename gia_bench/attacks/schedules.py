"""How the learning rate changes while an attack runs: a factor, from the number of the step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias, final

from gia_bench.attacks.checks import check

Schedule: TypeAlias = Callable[[int, int], float]
"""(step, counted from 0; steps in all) -> factor on the learning rate of that step."""


@final
@dataclass(frozen=True)
class Constant:
    """The learning rate as it is."""

    def __call__(self, step: int, steps: int) -> float:
        return 1.0


@final
@dataclass(frozen=True, kw_only=True)
class StepDecay:
    """The learning rate times ``factor`` from each milestone on.

    milestones: fractions of all steps, in (0, 1). Defaults: Inverting Gradients (Geiping et al. 2020), whose code
    rounds 3/8, 5/8 and 7/8 to three digits.
    """

    milestones: tuple[float, ...] = (0.375, 0.625, 0.875)
    factor: float = 0.1

    def __post_init__(self) -> None:
        object.__setattr__(self, "milestones", tuple(self.milestones))  # a config gives a list
        check(all(0 < m < 1 for m in self.milestones), "milestones", self.milestones, "fractions between 0 and 1")
        check(self.factor > 0, "factor", self.factor, "a number above 0")

    def __call__(self, step: int, steps: int) -> float:
        return float(self.factor ** sum(step >= int(m * steps) for m in self.milestones))


@final
@dataclass(frozen=True, kw_only=True)
class CosineWarmup:
    """Up in a straight line for ``warmup`` steps, then half a cosine down to 0 (Yin et al. 2021, GradInversion).

    The first step has 1 / warmup of the learning rate, and the step after the last one would have 0.
    """

    warmup: int = 50

    def __post_init__(self) -> None:
        check(self.warmup >= 0, "cosine_warmup.warmup", self.warmup, "at least 0")

    def __call__(self, step: int, steps: int) -> float:
        if step < self.warmup:
            return (step + 1) / self.warmup
        return (1 + math.cos(math.pi * (step - self.warmup) / (steps - self.warmup))) / 2
