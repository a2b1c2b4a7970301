"""Inverting Gradients (Geiping, Bauermeister, Dröge and Moeller 2020, arXiv 2003.14053)."""

from __future__ import annotations

from typing import Unpack

from gia_bench.attacks.distances import Cosine
from gia_bench.attacks.initial import Randn
from gia_bench.attacks.matching import GradientMatching, Parts
from gia_bench.attacks.optimizers import Adam, Sign
from gia_bench.attacks.priors import TotalVariation
from gia_bench.attacks.schedules import StepDecay

INVERTING_GRADIENTS: Parts = {
    "steps": 24_000,
    "labels": "auto",
    "boxed": True,
    "distance": Cosine(),
    "optimizer": Adam(lr=0.1, transform=Sign()),
    "schedule": StepDecay(),
    "initial": Randn(),
    "priors": {"total_variation": TotalVariation(weight=1e-4)},
    "snapshot_every": 500,
}


def inverting_gradients(**parts: Unpack[Parts]) -> GradientMatching:
    """Signed Adam on 1 - cosine + total variation, images kept in [0, 1], learning rate x0.1 at 3/8, 5/8 and 7/8.

    Defaults: the released command line's (total variation 1e-4), with the ImageNet notebook's 24,000 steps. Pixels,
    learning rate and total variation are in normalised units where the victim normalises. Arguments: see
    ``GradientMatching``.
    """
    return GradientMatching(**(INVERTING_GRADIENTS | parts))
