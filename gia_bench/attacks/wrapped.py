"""Distances around another distance: on fewer entries, on fewer layers, weighted, scaled. They nest in any order.

Each hands the whole dummy update on: its names are the model's, the head's last, however little of it was observed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias, final

import torch
from torch import Tensor

from gia_bench.attacks.checks import check
from gia_bench.attacks.distances import Distance, LayerCosine
from gia_bench.errors import ConfigError, IncompatibleError, choices
from gia_bench.values import Update


@final
@dataclass(frozen=True, kw_only=True)
class Masked:
    """The distance on the entries that were sent: where the observed update is larger than ``threshold`` in magnitude.

    What a pruning defense withheld says nothing, so the dummy update is not asked to be zero there. An update without a
    zero is matched whole. The reference for its masked cosine is breaching, with a threshold of 1e-6.
    """

    distance: Distance
    threshold: float = 0.0

    def __post_init__(self) -> None:
        check(self.threshold >= 0, "masked.threshold", self.threshold, "at least 0")

    def __call__(self, dummy: Update, observed: Update) -> Tensor:
        sent = {k: (v.abs() > self.threshold).to(v.dtype) for k, v in observed.items()}
        masked, seen = ({k: u[k] * m for k, m in sent.items()} for u in (dummy, observed))
        return self.distance({**dummy, **masked}, seen)


Selection: TypeAlias = Callable[[Update], list[str]]
"""(an update of the whole model) -> names of the tensors that are compared."""


def _all(update: Update) -> list[str]:
    return list(update)


def _fc(update: Update) -> list[str]:
    return [k for k in update if _layer(k) == _layer(list(update)[-1])]


def _all_but_last(update: Update) -> list[str]:
    return [k for k in update if _layer(k) != _layer(list(update)[-1])]


def _all_conv(update: Update) -> list[str]:
    convolutions = {_layer(k) for k, v in update.items() if v.ndim == 4}
    return [k for k in update if _layer(k) in convolutions]


def _first_conv(update: Update) -> list[str]:
    names = _all_conv(update)
    return [k for k in names if _layer(k) == _layer(names[0])]


def _layer(name: str) -> str:
    return name.rpartition(".")[0]


SELECTIONS: Mapping[str, Selection] = {
    "all": _all,
    "all_but_last": _all_but_last,
    "fc": _fc,
    "first_conv": _first_conv,
    "all_conv": _all_conv,
}
"""What can be chosen as ``layers``. ``fc`` is the head, weight and bias; of a model without one, the last layer."""


@final
@dataclass(frozen=True, kw_only=True)
class Layers:
    """The distance on some of the model's layers; the others are muted (Wang et al. 2022, GradDefense: "PLD-muted").

    An attacker who thinks that a layer was tampered with leaves it out. layers: a name in ``SELECTIONS``. Raises
    ``IncompatibleError`` where the model, or the part of the update that is shown, has none of those layers.
    """

    distance: Distance
    layers: str = "all_but_last"

    def __post_init__(self) -> None:
        if self.layers not in SELECTIONS:
            raise ConfigError(choices("layers", self.layers, SELECTIONS))

    def __call__(self, dummy: Update, observed: Update) -> Tensor:
        chosen = set(SELECTIONS[self.layers](dummy))
        heard = {k: v for k, v in observed.items() if k in chosen}
        if not heard:
            raise IncompatibleError(
                f"layers={self.layers} selects none of the tensors that this update shows ({', '.join(observed)}); "
                f"choose another of: {', '.join(SELECTIONS)}."
            )
        return self.distance(dummy, heard)


WEIGHTS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda age: 1 - age / len(age),
    "exp": lambda age: (-age).exp(),
}
"""Weights of the tensors by their place in the model, 0 the first, which weighs 1 (Geiping et al. 2020)."""


@final
@dataclass(frozen=True, kw_only=True)
class Weighted:
    """The distance with the model's first tensors weighing more than its last (Geiping et al. 2020).

    weights: ``linear`` (1 to 1 / the number of tensors) or ``exp`` (e^-i). A weight multiplies squares and products, so
    that the Euclidean and the cosine distance are the authors'; ``LayerCosine`` does not change and is refused.
    """

    distance: Distance
    weights: str = "linear"

    def __post_init__(self) -> None:
        if self.weights not in WEIGHTS:
            raise ConfigError(choices("weights", self.weights, WEIGHTS))
        check(
            not isinstance(self.distance, LayerCosine),
            "weighted.distance",
            self.distance,
            "a distance that has lengths",
        )

    def __call__(self, dummy: Update, observed: Update) -> Tensor:
        some = next(iter(observed.values()))
        places = torch.arange(len(dummy), dtype=some.dtype, device=some.device)
        roots = dict(zip(dummy, WEIGHTS[self.weights](places).sqrt(), strict=True))
        weighed, seen = ({k: v * roots[k] for k, v in u.items()} for u in (dummy, observed))
        return self.distance(weighed, seen)


@final
@dataclass(frozen=True, kw_only=True)
class Scaled:
    """The distance times ``factor``, which sets it against the priors."""

    distance: Distance
    factor: float

    def __post_init__(self) -> None:
        check(self.factor > 0, "scaled.factor", self.factor, "a number above 0")

    def __call__(self, dummy: Update, observed: Update) -> Tensor:
        return self.factor * self.distance(dummy, observed)
