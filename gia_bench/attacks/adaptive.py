"""What an attacker who knows the defense asks of a guess beside the distance: ``threat=adaptive``.

Everything comes from the public hyperparameters of ``observation.defense``. Where the defense is not shown, or says
nothing of the kind, nothing is asked.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol, final, runtime_checkable

import torch
from torch import Tensor

from gia_bench.attacks.checks import check
from gia_bench.attacks.distances import Distance
from gia_bench.values import Observation, Update


class Constraint(ABC):
    """A penalty on a guess's update before any defense, added to the distance; 0 where nothing is violated."""

    @abstractmethod
    def __call__(self, dummy: Update, observation: Observation, unit: float) -> Tensor:
        """The weighted penalty. dummy, observation.update: in the update's units; unit: what they are divided by
        before a distance sees them (``scene.update_unit``)."""


@final
@dataclass(frozen=True, kw_only=True)
class Withheld(Constraint):
    """weight * the squared distance to the nearest update of which the defense would have withheld the same entries.

    Of DGP the k1 largest missing entries are at least as large as the largest seen, the other missing ones at most as
    large as the smallest seen; of Top-k the second alone holds (``Defense.violation``). With weight 1 a violated entry
    counts as in the Euclidean distance. gia_bench's own; no paper attacks so.

    relative: for distances without length (cosine): the guess's update is first scaled to the observed length on the
    entries that were sent, and the penalty is a share of the observed squared length.
    """

    weight: float = 1.0
    relative: bool = False

    def __post_init__(self) -> None:
        check(self.weight >= 0, "withheld.weight", self.weight, "at least 0")

    def __call__(self, dummy: Update, observation: Observation, unit: float) -> Tensor:
        defense, seen = observation.defense, observation.update
        if defense is None:
            return next(iter(dummy.values())).new_zeros(())
        if not self.relative:
            return self.weight / unit**2 * defense.violation(dummy, observation)
        sent = defense.surrogate(dummy, observation)
        length, own = (torch.stack([u.square().sum() for u in part.values()]).sum() for part in (seen, sent))
        tiny = torch.finfo(length.dtype).tiny
        # a guess that sends next to nothing has no length to be scaled to; dividing by it would give NaN
        scale = (length / torch.where(own > 1e-12 * length, own, length).clamp(min=tiny)).sqrt()
        violation = defense.violation({k: scale * v for k, v in dummy.items()}, observation)
        return self.weight * violation / length.clamp(min=tiny)


@runtime_checkable
class Informed(Protocol):
    """A distance that depends on what else is observed; asked once, before the search."""

    def informed(self, observation: Observation, unit: float) -> Distance:
        """The distance between updates that are divided by ``unit``."""
        ...


@final
@dataclass(frozen=True, kw_only=True)
class Likelihood:
    """factor * minus the log density, or probability, of what chance must have done, in nats, up to a constant.

    Gaussian noise: squares / (2 sigma^2); Laplace noise: magnitudes / b, by the variance that the defense publishes;
    stochastic rounding: the probability of the multiple that was sent.
    With priors that are minus log densities (times ``factor``) too, the lowest loss is the most probable image; with
    ``factor`` a total variation of the usual weight is such a prior. A defense without such a law, or one that is
    not shown, is met with the distance ``otherwise``. factor: gia_bench choice.
    """

    otherwise: Distance
    factor: float = 1e-8

    def __post_init__(self) -> None:
        check(self.factor > 0, "likelihood.factor", self.factor, "a number above 0")

    def informed(self, observation: Observation, unit: float) -> Distance:
        """The noise's own distance, or ``otherwise``."""
        law = None if observation.defense is None else observation.defense.noise_law(observation)
        if law is None:
            return self.otherwise

        def surprise(dummy: Update, observed: Update) -> Tensor:
            own, seen = ({k: unit * update[k] for k in observed} for update in (dummy, observed))
            return self.factor * law.surprise(own, seen)

        return surprise

    def __call__(self, dummy: Update, observed: Update) -> Tensor:
        """``otherwise``: without an observation nothing is known of any noise."""
        return self.otherwise(dummy, observed)
