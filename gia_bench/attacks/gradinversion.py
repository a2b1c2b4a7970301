"""GradInversion, also "See through gradients" (Yin et al., CVPR 2021, arXiv 2104.07586). Its code was not released."""

from __future__ import annotations

from typing import Unpack

from gia_bench.attacks.batch_norm import RunningStatistics
from gia_bench.attacks.distances import Euclidean
from gia_bench.attacks.forces import GroupConsistency, Langevin
from gia_bench.attacks.initial import Randn
from gia_bench.attacks.matching import GradientMatching, Parts
from gia_bench.attacks.optimizers import Adam
from gia_bench.attacks.priors import Norm, PaddedTotalVariation
from gia_bench.attacks.registration import Translation
from gia_bench.attacks.schedules import CosineWarmup
from gia_bench.attacks.wrapped import Scaled

GRADINVERSION: Parts = {
    "steps": 20_000,
    "restarts": 4,
    "labels": "gradinversion",
    "boxed": True,
    "distance": Scaled(distance=Euclidean(), factor=0.5e-4),
    "optimizer": Adam(lr=0.1),
    "schedule": CosineWarmup(),
    "initial": Randn(),
    "priors": {
        "total_variation": PaddedTotalVariation(weight=1e-4),
        "norm": Norm(weight=1e-6),
        "batch_norm": RunningStatistics(weight=0.1),
    },
    "forces": {
        "langevin": Langevin(scale=0.01),
        "group": GroupConsistency(weight=0.01, registration=Translation(max_shift=0.25)),
    },
    "snapshot_every": 500,
}


def gradinversion(**parts: Unpack[Parts]) -> GradientMatching:
    """Squared differences + total variation + norm + BatchNorm statistics, with noise, restarts drawn to their mean.

    Defaults: breaching's settings, which has no group term; that one from GIFD's code (4 restarts in lock-step, 0.01,
    from step 500 on), but with the restarts registered to each other, as in the paper: by translations here, by
    RANSAC-flow there. For batches without repeated labels. Takes all parts of ``GradientMatching``.
    """
    return GradientMatching(**(GRADINVERSION | parts))
