"""Deep Leakage from Gradients (Zhu, Liu and Han 2019, arXiv 1906.08935)."""

from __future__ import annotations

from typing import Unpack

from gia_bench.attacks.distances import Euclidean
from gia_bench.attacks.initial import Randn
from gia_bench.attacks.lbfgs import LBFGS
from gia_bench.attacks.matching import GradientMatching, Parts

DLG: Parts = {
    "steps": 300,
    "labels": "joint",
    "distance": Euclidean(),
    "optimizer": LBFGS(),
    "initial": Randn(),
    "snapshot_every": 10,
}


def dlg(**parts: Unpack[Parts]) -> GradientMatching:
    """Images and soft labels together: L-BFGS on the sum of squared differences, from standard normal guesses.

    Defaults: the released code (300 outer steps; the paper's text says 1,200 for images). No box, no prior. The
    returned labels are the largest entries of the *optimised* ones. Takes all parts of ``GradientMatching``.
    """
    return GradientMatching(**(DLG | parts))
