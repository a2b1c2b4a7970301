"""Feature fishing: of examples that look alike to the last layer, the one farthest out alone sends gradients."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from gia_bench.attacks.base import FORGET, Attack, Broadcast, Snapshots
from gia_bench.attacks.checks import check
from gia_bench.attacks.fishing import (
    check_inner,
    check_last_layer,
    filled,
    last_layer,
    only_body,
    target_of,
    whole_counts,
)
from gia_bench.attacks.imprint import FAR
from gia_bench.attacks.matching import GradientMatching
from gia_bench.attacks.scene import update_unit
from gia_bench.errors import ConfigError, IncompatibleError, choices
from gia_bench.models.functional import Victim
from gia_bench.threat import Knowledge, Power
from gia_bench.values import Buffers, Examples, Observation, Params, Reconstruction

FISH = ("target", "others")
ALWAYS = 1e6
"""So many standard deviations no feature is away from the threshold."""


@final
@dataclass(frozen=True, kw_only=True)
class FeatureFishing(Attack):
    """A threshold on one feature leaves in the update of a batch only the examples beyond it (Wen et al. 2022, for
    batches in which a class occurs more than once); gradient matching then rebuilds them.

    The last layer becomes 0 but for one number: the weight from one feature f to the target class, with the target's
    bias, so that its logit is feature_multiplier (f - threshold) / (standard deviation of f) and all others are 0. The
    softmax is saturated on either side. Above the threshold the target class is certain, below it has no probability.

    fish: "target" (paper) is for batches of the target class alone: of those the examples below the threshold send
    gradients. "others" (gia_bench choice) is for batches without the target class, of whatever classes: those above the
    threshold send gradients. No last layer can silence examples of the target class and of others on the same side, so
    a batch with both sends a mixture, and what is rebuilt is not to be trusted.

    share: of the examples, how many lie beyond the threshold; 1 / B gives one in the mean. The threshold and the
    standard deviation come from public examples (of the target class, or of the others; gia_bench choice: the paper
    estimates them from updates of other rounds), the feature is that of the largest standard deviation ("most spread"
    in breaching). feature_multiplier: 300 in breaching, there without the standard deviation (gia_bench choice, so that
    it means the same for every model). num_public: public examples that are looked at. attack, target_class, and what
    is returned for other images: as in ``ClassFishing``. The inner attack is given a last layer that is saturated for
    every image, in which the examples beyond the threshold have exactly the gradient that was sent.
    """

    attack: GradientMatching
    target_class: int | None = None
    fish: str = "target"
    share: float = 0.125
    feature_multiplier: float = 300.0
    num_public: int = 1000

    def __post_init__(self) -> None:
        check_inner(self.attack, self.target_class)
        check(0 < self.share <= 1, "attack.share", self.share, "a share in (0, 1]")
        check(self.feature_multiplier > 0, "attack.feature_multiplier", self.feature_multiplier, "a number above 0")
        check(self.num_public >= 2, "attack.num_public", self.num_public, "at least 2")
        if self.fish not in FISH:
            raise ConfigError(choices("attack.fish", self.fish, FISH))

    @property
    def requires(self) -> Knowledge:
        return self.attack.requires & ~Knowledge.LABELS | Knowledge.NUM_EXAMPLES | Knowledge.PUBLIC

    @property
    def needs(self) -> Power:
        return Power.CHANGE_PARAMS

    @property
    def max_local_steps(self) -> int | None:
        """A second step has another last layer, whose threshold lies elsewhere."""
        return 1

    def check_victim(self, victim: Victim) -> None:
        """Needs a linear head with a bias, and a softmax behind it."""
        check_last_layer(victim, self.target_class)

    def tamper(self, honest: Broadcast, *, seed: int, public: Examples | None = None) -> Broadcast:
        """The honest model with another last layer."""
        assert public is not None  # required, and so checked
        victim, params = honest.victim, honest.params
        weight, bias = last_layer(victim)
        target = target_of(self.target_class, victim, seed)
        rows = torch.arange(min(self.num_public, len(public)))
        like = params[weight]
        features = head_inputs(victim, params, honest.buffers, public.images(rows).to(like)).double()
        wanted = (public.labels[rows] == target) == (self.fish == "target")
        values = features[wanted.to(features.device)] if int(wanted.sum()) > 1 else features
        spread = values.std(0)
        feature = int(spread.argmax())
        threshold = self._threshold(values[:, feature])
        slope = self.feature_multiplier / spread[feature]
        changed = {weight: torch.zeros_like(like), bias: torch.zeros_like(params[bias])}
        changed[weight][target, feature] = slope
        changed[bias][target] = -slope * threshold
        return Broadcast(victim, {**params, **changed}, honest.buffers)

    def _threshold(self, values: Tensor) -> Tensor:
        """The value that ``share`` of values [n] lie beyond."""
        side = 1 if self.fish == "target" else -1
        if self.share == 1:
            return side * ((side * values).max() + FAR * values.std())
        return side * torch.quantile(side * values, self.share)

    def reconstruct_many(
        self,
        observations: Sequence[Observation],
        victim: Victim,
        *,
        seeds: Sequence[int],
        snapshots: Snapshots = FORGET,
    ) -> list[Reconstruction]:
        weight, bias = last_layer(victim)
        targets = [int(o.params[weight].abs().sum(1).argmax()) for o in observations]
        read = [_read(o, bias, t) for o, t in zip(observations, targets, strict=True)]
        numbers = [self._fished(counts, below, t) for (counts, below), t in zip(read, targets, strict=True)]
        caught = [i for i, number in enumerate(numbers) if number]
        alone = [self._alone(observations[i], numbers[i], targets[i], weight, bias) for i in caught]
        found = self.attack.reconstruct_many(alone, victim, seeds=[seeds[i] for i in caught], snapshots=snapshots)
        rebuilt = dict(zip(caught, found, strict=True))
        reason = "the update holds no example beyond the feature's threshold"
        return [filled(o, victim, read[i][0], rebuilt.get(i), reason) for i, o in enumerate(observations)]

    def _fished(self, counts: Tensor, below: int, target: int) -> int:
        """How many examples were on the side that sends gradients."""
        of_target, B = int(counts[target]), int(counts.sum())
        return min(below, of_target) if self.fish == "target" else min(B - below, B - of_target)

    def _alone(self, observation: Observation, number: int, target: int, weight: str, bias: str) -> Observation:
        """What the fished examples would have sent alone, and a last layer that every image leaves saturated."""
        own = self.fish == "target"
        params = dict(observation.params)
        shift = torch.zeros_like(params[bias])
        shift[target] = (-1 if own else 1) * ALWAYS * self.feature_multiplier
        params[bias] = params[bias] + shift
        label = target if own else (target + 1) % len(shift)
        alone = only_body(observation, number, label, weight, bias)
        return dataclasses.replace(alone, params=params)


def head_inputs(victim: Victim, params: Params, buffers: Buffers, images: Tensor) -> Tensor:
    """What reaches the last linear layer [n, features], for images [n, C, H, W] in [0, 1]."""
    weight, _ = last_layer(victim)
    layer = victim.module.get_submodule(weight.removesuffix("weight").removesuffix("."))
    seen: list[Tensor] = []

    def keep(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        seen.append(arguments[0])

    handle = layer.register_forward_pre_hook(keep)
    try:
        with torch.no_grad():
            victim.logits(params, buffers, images)
    finally:
        handle.remove()
    return seen[0].flatten(1)


def _read(observation: Observation, bias: str, target: int) -> tuple[Tensor, int]:
    """How many examples of each class an update holds [classes] int64, and how many lie below the threshold.

    The bias's gradient is mean(p - y), where p is 1 for the target above the threshold, and below it 1 / (classes - 1)
    for each of the others. Of these one is taken to be absent from the batch: else the number below cannot be told.
    """
    B = observation.num_examples
    if B is None or bias not in observation.update:
        raise IncompatibleError(f"Feature fishing needs num_examples and the update of {bias!r}, which are not shown.")
    entries = observation.update[bias].detach().to("cpu", torch.float64) / update_unit(observation)
    entries = entries.nan_to_num(0.0, 0.0, 0.0)
    others = max(len(entries) - 1, 1)
    away = torch.arange(len(entries)) != target
    largest = float(entries[away].max()) if len(entries) > 1 else 0.0
    below = min(max(round(others * B * largest), 0), B)
    p = torch.full_like(entries, below / B / others)
    p[target] = 1 - below / B
    return whole_counts(entries, p, B), below
