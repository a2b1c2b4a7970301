"""Deep Leakage from Gradients (Zhu, Liu and Han 2019, arXiv 1906.08935)."""

from __future__ import annotations

from gia_bench.attacks.arithmetic import PLAIN, Arithmetic
from gia_bench.attacks.distances import Distance, Euclidean
from gia_bench.attacks.initial import Initial, Randn
from gia_bench.attacks.lbfgs import LBFGS
from gia_bench.attacks.matching import GradientMatching
from gia_bench.attacks.optimizers import Optimizer

EUCLIDEAN, OPTIMIZER, RANDN = Euclidean(), LBFGS(), Randn()


def dlg(
    *,
    steps: int = 300,
    restarts: int = 1,
    labels: str = "joint",
    distance: Distance = EUCLIDEAN,
    optimizer: Optimizer = OPTIMIZER,
    initial: Initial = RANDN,
    max_batch: int | str | None = None,
    arithmetic: Arithmetic = PLAIN,
    snapshot_every: int = 10,
) -> GradientMatching:
    """Images and soft labels together: L-BFGS on the sum of squared differences, from standard normal guesses.

    Defaults: the released code (300 outer steps; the paper's text says 1,200 for images). No box, no prior. The
    returned labels are the largest entries of the *optimised* ones. Arguments: see ``GradientMatching``.
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
