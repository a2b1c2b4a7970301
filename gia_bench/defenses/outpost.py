"""Outpost: gradients are pruned and noised at every local step, more where they and the weights say more."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from gia_bench.defenses.base import BatchLoss, Client, Defense
from gia_bench.defenses.checks import check
from gia_bench.defenses.draws import normal
from gia_bench.defenses.selection import on_support, restricted
from gia_bench.defenses.sparsify import GradientCompression
from gia_bench.rows import cut, joined
from gia_bench.values import Batch, Buffers, Noise, Observation, Params, Shared, State, Update
from gia_bench.wire import SPARSE, Codec

APPLY = "apply"


@final
@dataclass(frozen=True, kw_only=True)
class Outpost(Defense):
    """With probability 1 / (1 + beta * iteration) a local step's gradient is pruned and noised (Wang et al. 2023).

    Per tensor, entries below the ``prune`` percentile of magnitudes become 0. Then N(0, (risk * noise_base)^2) is added
    where the Fisher information is at or above the percentile 1 - phi of all tensors' together. risk: min(variance, 1)
    of each tensor's weights as the step starts; Fisher information: the squared gradient's mean over its first axis, so
    that a bias has one number and is noised as a whole or not at all. Percentiles are numpy's.

    phi: share of the Fisher information that is noised, in (0, 1]; prune: share in [0, 1); noise_base, beta: >= 0.

    iteration: the authors' code takes current_epoch * (batch + 1), epochs from 1 and batches from 0, both of the local
    work alone: it starts again in every round, and under FedSGD it is always 1. Here likewise, with ``steps_per_epoch``
    batches in a local epoch; None: one epoch, so that iteration counts the round's local steps from 1 (gia_bench
    choice: a round's work may be given in steps). A tensor of one entry has risk 0 (gia_bench choice: its variance is
    0 / 0). The authors' newest code computes all this and sends the gradient itself; what is done here is their older
    code's and their paper's.
    """

    phi: float = 0.4
    prune: float = 0.8
    noise_base: float = 0.8
    beta: float = 0.125
    steps_per_epoch: int | None = None

    def __post_init__(self) -> None:
        check("defense outpost: phi", self.phi, lambda p: 0 < p <= 1, "lie in (0, 1]; it is a share, 0.4 means 40 %")
        check(
            "defense outpost: prune", self.prune, lambda p: 0 <= p < 1, "lie in [0, 1); it is a share, 0.8 means 80 %"
        )
        for name in ("noise_base", "beta"):
            check(f"defense outpost: {name}", getattr(self, name), lambda v: 0 <= v < math.inf, "be finite, at least 0")
        if self.steps_per_epoch is not None:
            check(
                "defense outpost: steps_per_epoch", self.steps_per_epoch, lambda n: n >= 1 and n == int(n),
                "be a whole number of at least 1, or null",
            )  # fmt: skip

    @property
    def codec(self) -> Codec:
        """Without the zeros: most of a single gradient that was perturbed."""
        return SPARSE

    def probability(self, step: int) -> float:
        """That local step ``step``, counted from 0, is perturbed."""
        epoch, place = divmod(step, self.steps_per_epoch) if self.steps_per_epoch else (0, step)
        return 1 / (1 + self.beta * (epoch + 1) * (place + 1))

    def draw(self, like: Params, batch: Batch, generator: torch.Generator) -> Noise:
        """For each local step ``apply.<step>``, a uniform number, and ``<step>.<parameter>``, standard normal ones."""
        noise: Noise = {}
        for step in range(batch.mask.shape[0]):
            noise[f"{APPLY}.{step}"] = torch.rand((), generator=generator)
            noise |= {f"{step}.{k}": n for k, n in normal(like, generator).items()}
        return noise

    def gradient(
        self, loss: BatchLoss, params: Params, batch: Batch, noise: Noise, step: int
    ) -> tuple[Update, Buffers, Tensor]:
        """The mean gradient, perturbed or not as drawn."""
        plain, buffers, value = super().gradient(loss, params, batch, noise, step)
        applied = noise[f"{APPLY}.{step}"].to(value.device) < self.probability(step)
        perturbed = self.perturbed(plain, params, {k: noise[f"{step}.{k}"] for k in plain})
        return {k: torch.where(applied, perturbed[k], g) for k, g in plain.items()}, buffers, value

    def perturbed(self, gradient: Update, params: Params, drawn: Noise) -> Update:
        """The pruned and noised gradient. ``drawn``: standard normal numbers by parameter name."""
        kept = restricted(gradient, GradientCompression(prune=self.prune).select(gradient))
        loud = self._loud(gradient)
        sent = {}
        for name, g in kept.items():
            risk = params[name].var().clamp(max=1) if g.numel() > 1 else g.new_zeros(())
            sent[name] = g + torch.where(loud[name], risk * self.noise_base * drawn[name].to(g.device, g.dtype), 0)
        return sent

    def protect(
        self, update: Update, client: Client, state: State, shared: Shared, noise: Noise
    ) -> tuple[Update, State]:
        """The update itself: its gradients are perturbed already."""
        return update, state

    @property
    def adds_noise(self) -> bool:
        """Unless noise_base is 0; on entries that the client's data choose, so that it has no law here."""
        return self.noise_base > 0

    def surrogate(self, update: Update, observation: Observation) -> Update:
        """The dummy update where the observed one is not zero: all of it where nothing was perturbed."""
        return on_support(update, observation.update)

    def _loud(self, gradient: Update) -> dict[str, Tensor]:
        """Where noise goes: bool, by parameter name, without the parameter's first axis."""
        fisher = {k: g.square().mean(0) if g.ndim else g.square() for k, g in gradient.items()}
        [mask] = GradientCompression(prune=1 - self.phi).select({"all": joined(fisher)}).values()
        return cut(mask, fisher)
