"""The two attacks by which GradDefense is measured (Wang, Guo, Xie and Qi, INFOCOM 2022).

Each has a muted form, ``distance=Layers(distance=..., layers="all_but_last")``: what an attacker does who knows that
the last layer was tampered with.
"""

from __future__ import annotations

from typing import Unpack

from gia_bench.attacks.distances import Cosine, Euclidean
from gia_bench.attacks.initial import Randn
from gia_bench.attacks.lbfgs import LBFGS
from gia_bench.attacks.matching import GradientMatching, Parts
from gia_bench.attacks.optimizers import Adam
from gia_bench.attacks.priors import TotalVariation
from gia_bench.attacks.schedules import StepDecay

DGA: Parts = {
    "steps": 500,
    "labels": "known",
    "distance": Euclidean(),
    "optimizer": LBFGS(),
    "initial": Randn(),
    "snapshot_every": 10,
}


def dga(**parts: Unpack[Parts]) -> GradientMatching:
    """The deep gradient attack: L-BFGS on the sum of squared differences, labels known (the worst case). For LeNet.

    Defaults: the paper's 500 iterations, taken as outer steps; one example per update. Arguments: see
    ``GradientMatching``.
    """
    return GradientMatching(**(DGA | parts))


GIA: Parts = {
    "steps": 1_000,
    "labels": "known",
    "distance": Cosine(),
    "optimizer": Adam(lr=0.1),
    "schedule": StepDecay(),
    "initial": Randn(),
    "priors": {"total_variation": TotalVariation(weight=1e-4)},
    "snapshot_every": 250,
}


def gia(**parts: Unpack[Parts]) -> GradientMatching:
    """Gradient inversion by the cosine distance + total variation, plain Adam, no box, labels known. For ConvNet.

    Defaults: the paper's 1,000 iterations; the rest from the authors' script, which does not take the gradient's sign
    (the paper's text says it does: ``optimizer.transform=Sign``). Takes all parts of ``GradientMatching``.
    """
    return GradientMatching(**(GIA | parts))
