"""Client Privacy Leakage (Wei et al. 2020, arXiv 2004.10397)."""

from __future__ import annotations

from gia_bench.attacks.arithmetic import PLAIN, Arithmetic
from gia_bench.attacks.distances import Distance, Euclidean
from gia_bench.attacks.initial import Initial, Patterned
from gia_bench.attacks.lbfgs import LBFGS
from gia_bench.attacks.matching import GradientMatching
from gia_bench.attacks.optimizers import Optimizer

EUCLIDEAN, OPTIMIZER, PATTERNED = Euclidean(), LBFGS(), Patterned(width=16)


def cpl(
    *,
    steps: int = 300,
    restarts: int = 1,
    labels: str = "idlg",
    distance: Distance = EUCLIDEAN,
    optimizer: Optimizer = OPTIMIZER,
    initial: Initial = PATTERNED,
    max_batch: int | str | None = None,
    arithmetic: Arithmetic = PLAIN,
    snapshot_every: int = 10,
) -> GradientMatching:
    """iDLG from a guess that repeats one tile: the label is read, then L-BFGS over the image alone.

    Defaults: the released code's (tile of 16x16, 300 outer steps); the tile is standard normal, as in breaching. The
    task loss that breaching adds to the objective is not here. Arguments: see ``GradientMatching``.
    """
    return GradientMatching(
        distance=distance,
        optimizer=optimizer,
        initial=initial,
        labels=labels,
        steps=steps,
        restarts=restarts,
        max_batch=max_batch,
        arithmetic=arithmetic,
        snapshot_every=snapshot_every,
    )
