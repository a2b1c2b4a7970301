"""Priors on what BatchNorm layers see: the statistics of a guess, layer by layer, against those that are known.

Huang et al. 2021 (NeurIPS, "Evaluating Gradient Inversion Attacks") tell the two apart: an attacker who has only the
model's running statistics, and one who has those of the very batch. Here nobody is given the latter: an attacker who
sees the running statistics that a client sends back works them out, and after one local step they are exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, TypeAlias, final

import torch
from torch import Tensor, nn

from gia_bench.attacks.checks import check
from gia_bench.attacks.priors import Prior
from gia_bench.attacks.scene import Candidate, Scene
from gia_bench.models.functional import Victim
from gia_bench.threat import Knowledge
from gia_bench.values import Observation

Layer: TypeAlias = nn.modules.batchnorm._BatchNorm


class Statistics(NamedTuple):
    """Per channel, of one BatchNorm layer's input; the variance is divided by n, the number of entries per channel."""

    mean: Tensor
    variance: Tensor


Target: TypeAlias = Callable[[str, Layer, int], Statistics]
"""(a layer's name, the layer, n) -> the statistics that its input should have."""


@final
@dataclass(frozen=True, kw_only=True)
class RunningStatistics(Prior):
    """weight * sum over BatchNorm layers of ||mean - running mean||_2 + ||variance - running variance||_2.

    Yin et al. 2021 (GradInversion). first: the first layer's term counts that many times (10 in breaching and GIFD).
    A model without BatchNorm gives 0. Costs one more forward pass.
    """

    weight: float
    first: float = 10.0

    def __post_init__(self) -> None:
        _check_weights(self.weight, self.first)

    @property
    def requires(self) -> Knowledge:
        return Knowledge.BUFFERS

    def __call__(self, candidate: Candidate, scene: Scene) -> Tensor:
        buffers = scene.observation.buffers

        def running(name: str, layer: Layer, n: int) -> Statistics:
            return Statistics(buffers[f"{name}.running_mean"], buffers[f"{name}.running_var"])

        return self.weight * _distance(candidate, scene, running, self.first)


@final
@dataclass(frozen=True, kw_only=True)
class InferredStatistics(Prior):
    """As ``RunningStatistics``, but against those of the client's own batch, which ``inferred`` reads off what it sent.

    Exact for one local step; an update of several is refused, for its statistics are a mixture of batches. Needs a
    threat that shows the statistics that clients send back (threat=curious_server_buffers).
    """

    weight: float
    first: float = 10.0

    def __post_init__(self) -> None:
        _check_weights(self.weight, self.first)

    @property
    def requires(self) -> Knowledge:
        return Knowledge.BUFFERS | Knowledge.SENT_BUFFERS

    def refusal(self, observation: Observation, victim: Victim) -> str | None:
        sent, before = observation.sent_buffers or {}, observation.buffers
        for name, layer in norm_layers(victim).items():
            if layer.momentum is None:
                return f"the model's layer {name!r} averages over all rounds; give its BatchNorm a momentum."
            counter = f"{name}.num_batches_tracked"
            if counter not in sent or counter not in before:
                return (
                    "this update came without the client's own BatchNorm statistics; take "
                    "threat=curious_server_buffers, or RunningStatistics."
                )
            steps = int(sent[counter] - before[counter])
            if steps != 1:
                return (
                    f"the BatchNorm statistics sent with this update mix {steps} batches and only those of one local "
                    "step can be worked out; take fl=fedsgd, or RunningStatistics."
                )
        return None

    def __call__(self, candidate: Candidate, scene: Scene) -> Tensor:
        return self.weight * _distance(candidate, scene, partial(inferred, scene.observation), self.first)


def inferred(observation: Observation, name: str, layer: Layer, n: int) -> Statistics:
    """What the layer ``name`` saw in a client's one batch, with n entries per channel, from the statistics it sent.

    torch keeps sent = (1 - m) broadcast + m batch, m the momentum, where the batch's variance is divided by n - 1.
    """
    sent, before, m = observation.sent_buffers or {}, observation.buffers, layer.momentum
    assert m is not None
    mean, variance = (
        (sent[f"{name}.{k}"] - (1 - m) * before[f"{name}.{k}"]) / m for k in ("running_mean", "running_var")
    )
    return Statistics(mean, variance * (n - 1) / n)


def _check_weights(weight: float, first: float) -> None:
    check(weight >= 0, "batch_norm.weight", weight, "at least 0")
    check(first >= 0, "batch_norm.first", first, "at least 0")


def norm_layers(victim: Victim) -> dict[str, Layer]:
    """The BatchNorm layers that keep running statistics, by name."""
    named = victim.module.named_modules()
    return {k: m for k, m in named if isinstance(m, Layer) and m.track_running_stats}


@contextmanager
def _listening(layers: Mapping[str, Layer]) -> Iterator[dict[str, Tensor]]:
    """The inputs of ``layers``, by name, of the forward pass that is made inside."""
    heard: dict[str, Tensor] = {}

    def hear(name: str, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        heard[name] = inputs[0]

    hooks = [layer.register_forward_pre_hook(partial(hear, name)) for name, layer in layers.items()]
    try:
        yield heard
    finally:
        for hook in hooks:
            hook.remove()


def _distance(candidate: Candidate, scene: Scene, target: Target, first: float) -> Tensor:
    victim, seen = scene
    layers = norm_layers(victim)
    with _listening(layers) as inputs:
        if layers:
            victim.logits(seen.params, seen.buffers, candidate.inputs)
    total, weight = candidate.pixels.new_zeros(()), first
    for name, layer in layers.items():
        x = inputs[name].transpose(0, 1).flatten(1)
        wanted = target(name, layer, x.shape[1])
        mean, variance = x.mean(1), x.var(1, correction=0)
        total = total + weight * (_norm(mean - wanted.mean) + _norm(variance - wanted.variance))
        weight = 1.0
    return total


def _norm(x: Tensor) -> Tensor:
    # clamped, because the square root has no derivative where the statistics agree
    return x.square().sum().clamp(min=torch.finfo(x.dtype).tiny).sqrt()
