"""GradInversion, also "See through gradients" (Yin et al., CVPR 2021, arXiv 2104.07586). Its code was not released."""

from __future__ import annotations

from collections.abc import Mapping

from gia_bench.attacks.arithmetic import PLAIN, Arithmetic
from gia_bench.attacks.batch_norm import RunningStatistics
from gia_bench.attacks.distances import Distance, Euclidean
from gia_bench.attacks.forces import Force, GroupConsistency, Langevin
from gia_bench.attacks.initial import Initial, Randn
from gia_bench.attacks.matching import GradientMatching
from gia_bench.attacks.optimizers import Adam, Optimizer
from gia_bench.attacks.priors import Norm, PaddedTotalVariation, Prior
from gia_bench.attacks.registration import Translation
from gia_bench.attacks.schedules import CosineWarmup, Schedule
from gia_bench.attacks.wrapped import Scaled

DISTANCE, OPTIMIZER, RANDN, WARMUP = Scaled(distance=Euclidean(), factor=0.5e-4), Adam(lr=0.1), Randn(), CosineWarmup()
PRIORS: Mapping[str, Prior] = {
    "total_variation": PaddedTotalVariation(weight=1e-4),
    "norm": Norm(weight=1e-6),
    "batch_norm": RunningStatistics(weight=0.1),
}
GROUP = GroupConsistency(weight=0.01, registration=Translation(max_shift=0.25))
FORCES: Mapping[str, Force] = {"langevin": Langevin(scale=0.01), "group": GROUP}


def gradinversion(
    *,
    steps: int = 20_000,
    restarts: int = 4,
    labels: str = "gradinversion",
    boxed: bool = True,
    distance: Distance = DISTANCE,
    optimizer: Optimizer = OPTIMIZER,
    schedule: Schedule = WARMUP,
    initial: Initial = RANDN,
    priors: Mapping[str, Prior] = PRIORS,
    forces: Mapping[str, Force] = FORCES,
    max_batch: int | str | None = None,
    arithmetic: Arithmetic = PLAIN,
    snapshot_every: int = 500,
) -> GradientMatching:
    """Squared differences + total variation + norm + BatchNorm statistics, with noise, restarts drawn to their mean.

    Defaults: breaching's settings, which has no group term; that one from GIFD's code (4 restarts in lock-step, 0.01,
    from step 500 on), but with the restarts registered to each other, as in the paper: by translations here, by
    RANSAC-flow there. For batches without repeated labels. Arguments: see ``GradientMatching``.
    """
    return GradientMatching(
        distance=distance,
        optimizer=optimizer,
        schedule=schedule,
        initial=initial,
        priors=priors,
        forces=forces,
        labels=labels,
        steps=steps,
        restarts=restarts,
        boxed=boxed,
        max_batch=max_batch,
        arithmetic=arithmetic,
        snapshot_every=snapshot_every,
    )
