"""Sparse gradient inversion, for pruned models and sparse updates. The definition is ours.

PriPrune (Chu et al. 2023, arXiv 2310.19958) attacks with an "SGI" whose definition is not public.
"""

from __future__ import annotations

from typing import Unpack

from gia_bench.attacks.distances import Cosine
from gia_bench.attacks.initial import Randn
from gia_bench.attacks.matching import GradientMatching, Parts
from gia_bench.attacks.optimizers import Adam, Sign
from gia_bench.attacks.priors import TotalVariation
from gia_bench.attacks.schedules import StepDecay
from gia_bench.attacks.wrapped import Masked

SGI: Parts = {
    "steps": 24_000,
    "labels": "auto",
    "boxed": True,
    "distance": Masked(distance=Cosine()),
    "optimizer": Adam(lr=0.1, transform=Sign()),
    "schedule": StepDecay(),
    "initial": Randn(),
    "priors": {"total_variation": TotalVariation(weight=1e-4)},
    "snapshot_every": 500,
}


def sgi(**parts: Unpack[Parts]) -> GradientMatching:
    """Inverting Gradients on the entries that were sent: masked cosine + total variation, signed Adam.

    Everything is a gia_bench choice; what is not said is as in ``inverting_gradients``. On an update without zeros it
    *is* Inverting Gradients. Takes all parts of ``GradientMatching``.
    """
    return GradientMatching(**(SGI | parts))
