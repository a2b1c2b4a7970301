"""Closed-form inversion of a fully connected first layer (Phong et al. 2017; Geiping et al. 2020, proposition 3.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import final

import torch
from torch import Tensor, nn

from gia_bench.attacks.base import FORGET, Attack, Snapshots
from gia_bench.attacks.labels import METHODS
from gia_bench.attacks.scene import PixelSpace
from gia_bench.errors import ConfigError, IncompatibleError, choices
from gia_bench.models.functional import Victim
from gia_bench.threat import Knowledge
from gia_bench.values import Observation, Reconstruction

METHODS_READ = tuple(name for name in METHODS if name != "joint")


@final
@dataclass(frozen=True, kw_only=True)
class Analytic(Attack):
    """One image from one update: each row of the first layer's weight gradient is the image times the bias's entry.

    The least-squares image over all rows, on the entries that were sent: x_j = sum_i db_i dW_ij / sum_i db_i^2. Exact
    for one example, after several local steps on it too, and for a pruned update where each pixel keeps one row whose
    bias was sent. labels: how labels are found (``labels.METHODS`` without ``joint``). The score is the share of the
    observed weight gradient's energy that the image leaves unexplained. Raises ``IncompatibleError`` for a model that
    does not begin with a linear layer with a bias.
    """

    labels: str = "auto"

    def __post_init__(self) -> None:
        if self.labels not in METHODS_READ:
            raise ConfigError(choices("attack.labels", self.labels, METHODS_READ))

    @property
    def requires(self) -> Knowledge:
        return Knowledge.NUM_EXAMPLES | (Knowledge.LABELS if self.labels == "known" else Knowledge.NONE)

    @property
    def max_examples(self) -> int | None:
        return 1

    def check_victim(self, victim: Victim) -> None:
        """Needs a linear layer with a bias at the start."""
        _first_layer(victim)

    def reconstruct_many(
        self,
        observations: Sequence[Observation],
        victim: Victim,
        *,
        seeds: Sequence[int],
        snapshots: Snapshots = FORGET,
    ) -> list[Reconstruction]:
        weight, bias = _first_layer(victim)
        return [self._reconstruct(o, victim, weight, bias) for o in observations]

    def _reconstruct(self, observation: Observation, victim: Victim, weight: str, bias: str) -> Reconstruction:
        if observation.num_examples != 1:
            raise IncompatibleError(
                f"The closed form takes updates of one example, and this one holds {observation.num_examples}; "
                "train with one example per client and round."
            )
        if weight not in observation.update or bias not in observation.update:
            raise IncompatibleError(f"The closed form needs {weight!r} and {bias!r}, which this update does not show.")
        rows, scales = observation.update[weight].double(), observation.update[bias].double()[:, None]
        labels = METHODS[self.labels](observation, victim)
        pixels, unexplained = _least_squares(rows, scales)
        failure = f"every entry of {bias} in the observed update is zero" if not scales.any() else None
        if not pixels.isfinite().all():
            pixels, failure = torch.zeros_like(pixels), "the observed update holds NaN or infinity"
        like = observation.update[weight]
        return Reconstruction(
            inputs=PixelSpace.of(victim, like).decode(pixels.to(like.dtype).view(1, *victim.input_shape)),
            labels=labels,
            score=float("inf") if failure else unexplained,
            failure=failure,
        )


def _least_squares(rows: Tensor, scales: Tensor) -> tuple[Tensor, float]:
    """The x with rows = scales x^T on the entries of ``rows`` that are not zero, and the share of energy left."""
    sent = (rows != 0).double()
    weights = (sent * scales.square()).sum(0)
    x = torch.where(weights == 0, 0.0, (scales * rows).sum(0) / weights)  # a pixel of which nothing was sent is 0
    left = (rows - sent * scales * x).square().sum() / rows.square().sum().clamp(min=torch.finfo(rows.dtype).tiny)
    return x, float(left)


def _first_layer(victim: Victim) -> tuple[str, str]:
    """Names of its weight and bias."""
    layers = [(k, m) for k, m in victim.module.named_modules() if next(m.parameters(recurse=False), None) is not None]
    name, layer = layers[0] if layers else ("", nn.Identity())
    if not isinstance(layer, nn.Linear) or layer.bias is None or layer.in_features != prod(victim.input_shape):
        # tensors that belong to no layer, such as a transformer's positions, are those of the nameless whole
        kind = type(layer).__name__
        first = f"this one's first layer is {kind} {name!r}" if name else f"this is a whole {kind}"
        raise IncompatibleError(
            f"The closed form needs a model that begins with a linear layer with a bias, and {first}; take model=mlp."
        )
    prefix = f"{name}." if name else ""
    return f"{prefix}weight", f"{prefix}bias"
