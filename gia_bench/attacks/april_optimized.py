"""APRIL by search: gradient matching with a second look at the positions (Lu et al., CVPR 2022)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

from torch import Tensor

from gia_bench.attacks.arithmetic import PLAIN, Arithmetic
from gia_bench.attacks.checks import check
from gia_bench.attacks.distances import Cosine, Distance, Euclidean
from gia_bench.attacks.group import STEPS
from gia_bench.attacks.initial import Initial, Randn
from gia_bench.attacks.matching import GradientMatching
from gia_bench.attacks.optimizers import Adam, Optimizer
from gia_bench.attacks.priors import Prior
from gia_bench.attacks.replay import Replay
from gia_bench.attacks.schedules import Schedule, StepDecay
from gia_bench.errors import IncompatibleError
from gia_bench.values import Update

COSINE, EUCLIDEAN = Cosine(), Euclidean()


@final
@dataclass(frozen=True, kw_only=True)
class WithPositions:
    """distance + weight * (1 - the cosine of the angle between the gradients of the position embedding).

    The gradient of the positions is that of the tokens, summed over the batch: it depends on an image by way of every
    layer behind it, whatever the first attention looks like, so that no closed form is needed. names: how the position
    embedding's name ends. weight: the paper's balance between the two, whose value is a gia_bench choice. Raises
    ``IncompatibleError`` for an update that shows no such tensor.
    """

    distance: Distance = EUCLIDEAN
    weight: float = 1.0
    names: Sequence[str] = ("position", "pos_embedding")

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(self.names))
        check(self.weight >= 0, "with_positions.weight", self.weight, "at least 0")
        check(bool(self.names), "with_positions.names", self.names, "at least one name")

    def __call__(self, dummy: Update, observed: Update) -> Tensor:
        positions = {k: v for k, v in observed.items() if k.rpartition(".")[2] in self.names}
        if not positions:
            raise IncompatibleError(
                f"APRIL looks at the gradient of a position embedding ({', '.join(self.names)}), and this update shows "
                f"{', '.join(observed)}; take model=vit_april, or give its name in distance.names."
            )
        return self.distance(dummy, observed) + self.weight * COSINE(dummy, positions)


POSITIONS, OPTIMIZER, RANDN, DECAY = WithPositions(), Adam(lr=0.1), Randn(), StepDecay()
NOTHING: Mapping[str, Prior] = {}


def april_optimized(
    *,
    steps: int = 5_000,
    restarts: int = 1,
    labels: str = "auto",
    boxed: bool = False,
    distance: Distance = POSITIONS,
    optimizer: Optimizer = OPTIMIZER,
    schedule: Schedule = DECAY,
    initial: Initial = RANDN,
    priors: Mapping[str, Prior] = NOTHING,
    replay: Replay = STEPS,
    max_batch: int | str | None = None,
    arithmetic: Arithmetic = PLAIN,
    snapshot_every: int = 250,
) -> GradientMatching:
    """The squared distance of all gradients plus the cosine distance of the positions', for any transformer with a
    learnable position embedding and any number of examples.

    The paper's two terms; its weight between them, optimiser, steps and learning rate are gia_bench choices. Arguments:
    see ``GradientMatching``.
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
