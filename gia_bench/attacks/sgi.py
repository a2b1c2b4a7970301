"""Sparse gradient inversion, for pruned models and sparse updates. The definition is ours.

PriPrune (Chu et al. 2023, arXiv 2310.19958) attacks with an "SGI" whose definition is not public.
"""

from __future__ import annotations

from collections.abc import Mapping

from gia_bench.attacks.arithmetic import PLAIN, Arithmetic
from gia_bench.attacks.distances import Cosine, Distance
from gia_bench.attacks.initial import Initial, Randn
from gia_bench.attacks.matching import GradientMatching
from gia_bench.attacks.optimizers import Adam, Optimizer, Sign
from gia_bench.attacks.priors import Prior, TotalVariation
from gia_bench.attacks.schedules import Schedule, StepDecay
from gia_bench.attacks.wrapped import Masked

MASKED, OPTIMIZER, RANDN, DECAY = Masked(distance=Cosine()), Adam(lr=0.1, transform=Sign()), Randn(), StepDecay()
PRIORS: Mapping[str, Prior] = {"total_variation": TotalVariation(weight=1e-4)}


def sgi(
    *,
    steps: int = 24_000,
    restarts: int = 1,
    labels: str = "auto",
    boxed: bool = True,
    distance: Distance = MASKED,
    optimizer: Optimizer = OPTIMIZER,
    schedule: Schedule = DECAY,
    initial: Initial = RANDN,
    priors: Mapping[str, Prior] = PRIORS,
    max_batch: int | str | None = None,
    arithmetic: Arithmetic = PLAIN,
    snapshot_every: int = 500,
) -> GradientMatching:
    """Inverting Gradients on the entries that were sent: masked cosine + total variation, signed Adam.

    Everything is a gia_bench choice; what is not said is as in ``inverting_gradients``. On an update without zeros it
    *is* Inverting Gradients. Arguments: see ``GradientMatching``.
    """
    return GradientMatching(
        distance=distance,
        optimizer=optimizer,
        schedule=schedule,
        initial=initial,
        priors=priors,
        labels=labels,
        steps=steps,
        restarts=restarts,
        boxed=boxed,
        max_batch=max_batch,
        arithmetic=arithmetic,
        snapshot_every=snapshot_every,
    )
