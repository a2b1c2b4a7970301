"""Class fishing: a last layer that lets one class alone send gradients through the network (Wen et al. 2022)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from gia_bench.attacks.base import FORGET, Attack, Broadcast, Snapshots
from gia_bench.attacks.checks import check
from gia_bench.attacks.matching import GradientMatching
from gia_bench.attacks.scene import PixelSpace, update_unit
from gia_bench.errors import ConfigError, IncompatibleError
from gia_bench.models.functional import Head, Victim, cross_entropy
from gia_bench.seeding import derive
from gia_bench.threat import Knowledge, Power
from gia_bench.values import Examples, Observation, Reconstruction

LABELS = ("auto", "known")


@final
@dataclass(frozen=True, kw_only=True)
class ClassFishing(Attack):
    """Only the examples of one class are left in the update of a large batch, and gradient matching rebuilds them.

    The last layer's weight becomes 0 but for the target class's row, which is ``class_multiplier`` throughout; its bias
    becomes ``bias_multiplier`` for every class but the target, whose bias stays. The softmax then never gives the
    target any probability, so that an example of another class sends no gradient below the last layer, and one of the
    target class sends what it would send alone, times 1 / B. What the last bias's gradient holds is then known exactly:
    the counts of all classes. Examples of the target class are rebuilt together, on all layers but the last; a feature
    sorts several of them apart in ``FeatureFishing``.

    attack: what rebuilds them (its ``labels`` must be auto or known: the attacker knows them); target_class: None for
    one drawn from the seed (gia_bench choice); multipliers: 0.5 and 1000 in breaching. Images of other classes
    are zeros, in the coordinates the network sees. An update without an example of the target class is a failure with
    that reason. Raises ``IncompatibleError`` for a model that does not end in a linear layer with a bias, or for
    another loss than cross-entropy.
    """

    attack: GradientMatching
    target_class: int | None = None
    class_multiplier: float = 0.5
    bias_multiplier: float = 1000.0

    def __post_init__(self) -> None:
        check_inner(self.attack, self.target_class)
        check(self.class_multiplier > 0, "attack.class_multiplier", self.class_multiplier, "a number above 0")
        check(self.bias_multiplier > 0, "attack.bias_multiplier", self.bias_multiplier, "a number above 0")

    @property
    def requires(self) -> Knowledge:
        return self.attack.requires & ~Knowledge.LABELS | Knowledge.NUM_EXAMPLES

    @property
    def needs(self) -> Power:
        return Power.CHANGE_PARAMS

    @property
    def max_local_steps(self) -> int | None:
        """A second step has another last layer, which no longer keeps the other classes out."""
        return 1

    def check_victim(self, victim: Victim) -> None:
        """Needs a linear head with a bias, and a softmax behind it."""
        check_last_layer(victim, self.target_class)

    def tamper(self, honest: Broadcast, *, seed: int, public: Examples | None = None) -> Broadcast:
        """The honest model with another last layer."""
        victim, params = honest.victim, honest.params
        weight, bias = last_layer(victim)
        target = target_of(self.target_class, victim, seed)
        others = torch.arange(victim.num_classes, device=params[bias].device) != target
        changed = {
            weight: torch.where(others[:, None], 0, torch.full_like(params[weight], self.class_multiplier)),
            bias: torch.where(others, self.bias_multiplier, params[bias]),
        }
        return Broadcast(victim, {**params, **changed}, honest.buffers)

    def reconstruct_many(
        self,
        observations: Sequence[Observation],
        victim: Victim,
        *,
        seeds: Sequence[int],
        snapshots: Snapshots = FORGET,
    ) -> list[Reconstruction]:
        weight, bias = last_layer(victim)
        # whatever the honest bias is, it is far below the others'
        targets = [int(o.params[bias].argmin()) for o in observations]
        counts = [_counts(o, bias, t) for o, t in zip(observations, targets, strict=True)]
        caught = [i for i, t in enumerate(targets) if int(counts[i][t])]
        alone = [only_body(observations[i], int(counts[i][targets[i]]), targets[i], weight, bias) for i in caught]
        found = self.attack.reconstruct_many(alone, victim, seeds=[seeds[i] for i in caught], snapshots=snapshots)
        rebuilt = dict(zip(caught, found, strict=True))
        reasons = [f"the update holds no example of class {t}, which was fished for" for t in targets]
        return [filled(o, victim, counts[i], rebuilt.get(i), reasons[i]) for i, o in enumerate(observations)]


def check_inner(attack: GradientMatching, target_class: int | None) -> None:
    """Raises ``ConfigError`` for what cannot rebuild the fished examples, and for a class that cannot be."""
    if not isinstance(attack, GradientMatching) or attack.labels not in LABELS:
        raise ConfigError("attack.attack must be gradient matching with labels=auto: the attacker sets the class.")
    check(target_class is None or target_class >= 0, "attack.target_class", target_class, "a class")


def check_last_layer(victim: Victim, target_class: int | None) -> None:
    """Raises ``IncompatibleError`` without a linear last layer with a bias and a softmax, or without that class."""
    last_layer(victim)
    if victim.loss is not cross_entropy:
        raise IncompatibleError("Fishing needs the softmax of model.loss=cross_entropy.")
    if target_class is not None and target_class >= victim.num_classes:
        raise IncompatibleError(
            f"attack.target_class={target_class}: the model has {victim.num_classes} classes, counted from 0."
        )


def last_layer(victim: Victim) -> tuple[str, str]:
    """The names of its weight and bias."""
    head: Head | None = victim.head
    if head is None or head.bias is None:
        raise IncompatibleError("Fishing needs a model that ends in a linear layer with a bias; take another (lenet).")
    return head.weight, head.bias


def target_of(target_class: int | None, victim: Victim, seed: int) -> int:
    """The class that is chosen, or drawn from the seed."""
    return derive(seed, "target_class") % victim.num_classes if target_class is None else target_class


def _counts(observation: Observation, bias: str, target: int) -> Tensor:
    """How many examples of each class an update holds [classes] int64, summing to B.

    The bias's gradient is mean(p - y), and p is known: 0 for the target class, and equal for all others.
    """
    B = observation.num_examples
    if B is None or bias not in observation.update:
        raise IncompatibleError(f"Class fishing needs num_examples and the update of {bias!r}, which are not shown.")
    entries = observation.update[bias].detach().to("cpu", torch.float64) / update_unit(observation)
    p = torch.full_like(entries, 1 / max(len(entries) - 1, 1))
    p[target] = 0
    return whole_counts(entries, p, B)


def whole_counts(entries: Tensor, p: Tensor, B: int) -> Tensor:
    """B (p - entries) in whole numbers [classes] int64 that sum to B; p: mean probabilities over the batch."""
    counts = (B * (p - entries.nan_to_num(0.0, 0.0, 0.0))).clamp(min=0, max=B)
    whole = counts.round()
    while int(whole.sum()) != B:  # a protected update: those that were rounded most are changed
        step = 1 if int(whole.sum()) < B else -1
        gain = step * (counts - whole)
        gain[whole + step < 0] = -math.inf
        whole[gain.argmax()] += step
    return whole.long()


def only_body(observation: Observation, count: int, label: int, weight: str, bias: str) -> Observation:
    """The update below the last layer that ``count`` examples would have sent without the others."""
    factor = (observation.num_examples or 0) / count
    body = {k: factor * v for k, v in observation.update.items() if k not in (weight, bias)}
    labels = torch.full((count,), label, device=observation.update[bias].device)
    return dataclasses.replace(observation, update=body, num_examples=count, labels=labels)


def filled(
    observation: Observation, victim: Victim, counts: Tensor, rebuilt: Reconstruction | None, reason: str
) -> Reconstruction:
    """``rebuilt`` with zeros for the images that were not fished; a failure with ``reason`` where there is none."""
    like = next(iter(observation.update.values()))
    zeros = like.new_zeros(observation.num_examples or 0, *victim.input_shape)
    inputs = PixelSpace.of(victim, zeros).decode(zeros)
    labels = torch.arange(len(counts)).repeat_interleave(counts).to(like.device)
    if rebuilt is None:
        return Reconstruction(inputs=inputs, labels=labels, score=math.inf, failure=reason)
    inputs[: len(rebuilt.inputs)] = rebuilt.inputs
    return dataclasses.replace(rebuilt, inputs=inputs, labels=labels)
