"""Improved Deep Leakage from Gradients (Zhao, Mopuri and Bilen 2020, arXiv 2001.02610)."""

from __future__ import annotations

from typing import Unpack

from gia_bench.attacks.distances import Euclidean
from gia_bench.attacks.initial import Randn
from gia_bench.attacks.lbfgs import LBFGS
from gia_bench.attacks.matching import GradientMatching, Parts

IDLG: Parts = {
    "steps": 300,
    "labels": "idlg",
    "distance": Euclidean(),
    "optimizer": LBFGS(),
    "initial": Randn(),
    "stop_below": 1e-6,
    "snapshot_every": 10,
}


def idlg(**parts: Unpack[Parts]) -> GradientMatching:
    """The label is read off the last layer, for updates of one example; then L-BFGS over the image alone.

    Defaults: the released code, which stops at a loss below 1e-6. Takes all parts of ``GradientMatching``.
    """
    return GradientMatching(**(IDLG | parts))
