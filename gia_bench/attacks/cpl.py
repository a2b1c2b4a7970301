"""Client Privacy Leakage (Wei et al. 2020, arXiv 2004.10397)."""

from __future__ import annotations

from typing import Unpack

from gia_bench.attacks.distances import Euclidean
from gia_bench.attacks.initial import Patterned
from gia_bench.attacks.lbfgs import LBFGS
from gia_bench.attacks.matching import GradientMatching, Parts

CPL: Parts = {
    "steps": 300,
    "labels": "idlg",
    "distance": Euclidean(),
    "optimizer": LBFGS(),
    "initial": Patterned(width=16),
    "snapshot_every": 10,
}


def cpl(**parts: Unpack[Parts]) -> GradientMatching:
    """iDLG from a guess that repeats one tile: the label is read, then L-BFGS over the image alone.

    Defaults: the released code's (tile of 16x16, 300 outer steps); the tile is standard normal, as in breaching. The
    task loss that breaching adds to the objective is not here. Takes all parts of ``GradientMatching``.
    """
    return GradientMatching(**(CPL | parts))
