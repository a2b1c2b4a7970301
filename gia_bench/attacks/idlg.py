"""Improved Deep Leakage from Gradients (Zhao, Mopuri and Bilen 2020, arXiv 2001.02610)."""

from __future__ import annotations

from gia_bench.attacks.arithmetic import PLAIN, Arithmetic
from gia_bench.attacks.distances import Distance, Euclidean
from gia_bench.attacks.initial import Initial, Randn
from gia_bench.attacks.lbfgs import LBFGS
from gia_bench.attacks.matching import GradientMatching
from gia_bench.attacks.optimizers import Optimizer

EUCLIDEAN, OPTIMIZER, RANDN = Euclidean(), LBFGS(), Randn()


def idlg(
    *,
    steps: int = 300,
    restarts: int = 1,
    labels: str = "idlg",
    distance: Distance = EUCLIDEAN,
    optimizer: Optimizer = OPTIMIZER,
    initial: Initial = RANDN,
    stop_below: float | None = 1e-6,
    max_batch: int | str | None = None,
    arithmetic: Arithmetic = PLAIN,
    snapshot_every: int = 10,
) -> GradientMatching:
    """The label is read off the last layer, for updates of one example; then L-BFGS over the image alone.

    Defaults: the released code, which stops at a loss below 1e-6. Arguments: see ``GradientMatching``.
    """
    return GradientMatching(
        distance=distance,
        optimizer=optimizer,
        initial=initial,
        labels=labels,
        steps=steps,
        restarts=restarts,
        stop_below=stop_below,
        max_batch=max_batch,
        arithmetic=arithmetic,
        snapshot_every=snapshot_every,
    )
