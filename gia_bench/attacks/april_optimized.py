"""APRIL by search: gradient matching with a second look at the positions (Lu et al., CVPR 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Unpack, final

from torch import Tensor

from gia_bench.attacks.checks import check
from gia_bench.attacks.distances import Cosine, Distance, Euclidean
from gia_bench.attacks.initial import Randn
from gia_bench.attacks.matching import GradientMatching, Parts
from gia_bench.attacks.optimizers import Adam
from gia_bench.attacks.schedules import StepDecay
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


APRIL_OPTIMIZED: Parts = {
    "steps": 5_000,
    "labels": "auto",
    "distance": WithPositions(),
    "optimizer": Adam(lr=0.1),
    "schedule": StepDecay(),
    "initial": Randn(),
    "snapshot_every": 250,
}


def april_optimized(**parts: Unpack[Parts]) -> GradientMatching:
    """The squared distance of all gradients plus the cosine distance of the positions', for any transformer with a
    learnable position embedding and any number of examples.

    The paper's two terms; its weight between them, optimiser, steps and learning rate are gia_bench choices. Arguments:
    see ``GradientMatching``.
    """
    return GradientMatching(**(APRIL_OPTIMIZED | parts))
