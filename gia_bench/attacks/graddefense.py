"""The two attacks by which GradDefense is measured (Wang, Guo, Xie and Qi, INFOCOM 2022).

Each has a muted form, ``distance=Layers(distance=..., layers="all_but_last")``: what an attacker does who knows that
the last layer was tampered with.
"""

from __future__ import annotations

from collections.abc import Mapping

from gia_bench.attacks.arithmetic import PLAIN, Arithmetic
from gia_bench.attacks.distances import Cosine, Distance, Euclidean
from gia_bench.attacks.group import STEPS
from gia_bench.attacks.initial import Initial, Randn
from gia_bench.attacks.lbfgs import LBFGS
from gia_bench.attacks.matching import GradientMatching
from gia_bench.attacks.optimizers import Adam, Optimizer
from gia_bench.attacks.priors import Prior, TotalVariation
from gia_bench.attacks.replay import Replay
from gia_bench.attacks.schedules import Schedule, StepDecay

EUCLIDEAN, COSINE, DGA_OPTIMIZER, GIA_OPTIMIZER = Euclidean(), Cosine(), LBFGS(), Adam(lr=0.1)
RANDN, DECAY = Randn(), StepDecay()
PRIORS: Mapping[str, Prior] = {"total_variation": TotalVariation(weight=1e-4)}


def dga(
    *,
    steps: int = 500,
    restarts: int = 1,
    labels: str = "known",
    distance: Distance = EUCLIDEAN,
    optimizer: Optimizer = DGA_OPTIMIZER,
    initial: Initial = RANDN,
    max_batch: int | str | None = None,
    arithmetic: Arithmetic = PLAIN,
    snapshot_every: int = 10,
) -> GradientMatching:
    """The deep gradient attack: L-BFGS on the sum of squared differences, labels known (the worst case). For LeNet.

    Defaults: the paper's 500 iterations, taken as outer steps; one example per update. Arguments: see
    ``GradientMatching``.
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


def gia(
    *,
    steps: int = 1_000,
    restarts: int = 1,
    labels: str = "known",
    boxed: bool = False,
    distance: Distance = COSINE,
    optimizer: Optimizer = GIA_OPTIMIZER,
    schedule: Schedule = DECAY,
    initial: Initial = RANDN,
    priors: Mapping[str, Prior] = PRIORS,
    replay: Replay = STEPS,
    max_batch: int | str | None = None,
    arithmetic: Arithmetic = PLAIN,
    snapshot_every: int = 250,
) -> GradientMatching:
    """Gradient inversion by the cosine distance + total variation, plain Adam, no box, labels known. For ConvNet.

    Defaults: the paper's 1,000 iterations; the rest from the authors' script, which does not take the gradient's sign
    (the paper's text says it does: ``optimizer.transform=Sign``). Arguments: see ``GradientMatching``.
    """
    return GradientMatching(
        distance=distance,
        optimizer=optimizer,
        schedule=schedule,
        initial=initial,
        priors=priors,
        replay=replay,
        labels=labels,
        steps=steps,
        restarts=restarts,
        boxed=boxed,
        max_batch=max_batch,
        arithmetic=arithmetic,
        snapshot_every=snapshot_every,
    )
