"""Inverting Gradients (Geiping, Bauermeister, Dröge and Moeller 2020, arXiv 2003.14053)."""

from __future__ import annotations

from collections.abc import Mapping

from gia_bench.attacks.adaptive import Constraint
from gia_bench.attacks.arithmetic import PLAIN, Arithmetic
from gia_bench.attacks.distances import Cosine, Distance
from gia_bench.attacks.group import STEPS
from gia_bench.attacks.initial import Initial, Randn
from gia_bench.attacks.matching import GradientMatching
from gia_bench.attacks.optimizers import Adam, Optimizer, Sign
from gia_bench.attacks.priors import Prior, TotalVariation
from gia_bench.attacks.replay import Replay
from gia_bench.attacks.schedules import Schedule, StepDecay

COSINE, OPTIMIZER, RANDN, DECAY = Cosine(), Adam(lr=0.1, transform=Sign()), Randn(), StepDecay()
PRIORS: Mapping[str, Prior] = {"total_variation": TotalVariation(weight=1e-4)}
NOTHING: Mapping[str, Constraint] = {}


def inverting_gradients(
    *,
    steps: int = 24_000,
    restarts: int = 1,
    labels: str = "auto",
    boxed: bool = True,
    distance: Distance = COSINE,
    optimizer: Optimizer = OPTIMIZER,
    schedule: Schedule = DECAY,
    initial: Initial = RANDN,
    priors: Mapping[str, Prior] = PRIORS,
    constraints: Mapping[str, Constraint] = NOTHING,
    replay: Replay = STEPS,
    max_batch: int | str | None = None,
    arithmetic: Arithmetic = PLAIN,
    snapshot_every: int = 500,
) -> GradientMatching:
    """Signed Adam on 1 - cosine + total variation, images kept in [0, 1], learning rate x0.1 at 3/8, 5/8 and 7/8.

    Defaults: the released command line's (total variation 1e-4), with the ImageNet notebook's 24,000 steps. Pixels,
    learning rate and total variation are in normalised units where the victim normalises. Arguments: see
    ``GradientMatching``.
    """
    return GradientMatching(
        distance=distance,
        optimizer=optimizer,
        schedule=schedule,
        initial=initial,
        priors=priors,
        constraints=constraints,
        replay=replay,
        labels=labels,
        steps=steps,
        restarts=restarts,
        boxed=boxed,
        max_batch=max_batch,
        arithmetic=arithmetic,
        snapshot_every=snapshot_every,
    )
