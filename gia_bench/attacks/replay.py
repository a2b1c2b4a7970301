"""The update that a client would have sent for guessed images: one step for everything, or all its local steps.

A client of FedAvg walks through its data several times, in an order that only it knows. The guessed images have no
order of their own, so the first pass may take them as they stand. Known and inferred labels have one: which of them
meet in one batch is drawn for every restart, and never taken from the client.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from gia_bench.attacks.checks import check
from gia_bench.attacks.scene import Candidate, Scene, update_unit
from gia_bench.seeding import stream
from gia_bench.values import Batch, Observation, Update


class Replay(ABC):
    """How a guess becomes an update. ``copies``: the guesses per example, one behind the other: [copies * B, ...]."""

    def copies(self, observation: Observation) -> int:
        """How many guesses there are of every example."""
        return 1

    def arrange(self, labels: Tensor, observation: Observation, seed: int, restarts: int) -> Tensor:
        """The labels [restarts or 1, copies * B] of the guesses, from labels [B] in whatever order."""
        return labels[None]

    def multiple(self, observation: Observation) -> float | None:
        """The factor where ``update`` is nothing but a multiple of one gradient of the mean loss over all guesses, and
        there is no ``penalty``; else None."""
        return None

    @abstractmethod
    def update(self, batch: Batch, scene: Scene) -> Update:
        """The update of guesses [copies * B, ...], differentiable in them."""

    def penalty(self, candidate: Candidate, scene: Scene) -> Tensor:
        """What the guesses of one example owe each other: a scalar that is added to the distance."""
        return candidate.pixels.new_zeros(())

    def merge(self, pixels: Tensor, labels: Tensor, observation: Observation) -> tuple[Tensor, Tensor]:
        """The images [B, C, H, W] and labels ([B], or probabilities [B, classes]) that all guesses say together."""
        return pixels, labels


@final
@dataclass(frozen=True)
class OneStep(Replay):
    """One gradient on all examples at once, times the learning rate and the number of steps.

    Exact for one local step. For more it takes all gradients at the weights the client started from (Wei et al. 2020
    and others; here also the form for the aggregate of several clients, whose steps cannot be told apart).
    """

    def multiple(self, observation: Observation) -> float | None:
        return update_unit(observation)

    def update(self, batch: Batch, scene: Scene) -> Update:
        return _one_step(batch, scene)


@final
@dataclass(frozen=True)
class LocalSteps(Replay):
    """Every local step of the client, differentiated through (Geiping et al. 2020), in the same order in every pass.

    The order of later passes is not known; taking that of the first is a gia_bench choice, and without effect where a
    pass is one step. Of an aggregate of several clients, and where the local work is not shown, it is ``OneStep``.
    """

    def arrange(self, labels: Tensor, observation: Observation, seed: int, restarts: int) -> Tensor:
        return _shuffled(labels, 1, seed, restarts) if _ordered(observation) else labels[None]

    def multiple(self, observation: Observation) -> float | None:
        local = observation.local
        if local is None or observation.num_clients > 1:
            return update_unit(observation)
        return local.multiple(observation.num_examples or 0)

    def update(self, batch: Batch, scene: Scene) -> Update:
        local = scene.observation.local
        if local is None or scene.observation.num_clients > 1:
            return _one_step(batch, scene)
        return local.simulate(scene.victim, scene.observation.params, scene.observation.buffers, [batch])


@final
@dataclass(frozen=True, kw_only=True)
class EpochAverage(Replay):
    """Every local step, with guesses of its own for every pass, so that no order is assumed (Dimitrov et al. 2022).

    What an order cannot change must agree between the passes: weight * the mean over all pairs of passes of the squared
    difference of their mean images, averaged over pixels (searched coordinates). In the end the guesses of later passes
    are matched to those of the first (least squared distance; only those of the same label where labels are known) and
    averaged. The score is that of the guesses before they are averaged. weight, and the mean over pixels: gia_bench
    choices. Where a pass is one step, it is ``LocalSteps``.
    """

    weight: float = 0.1

    def __post_init__(self) -> None:
        check(self.weight >= 0, "epoch_average.weight", self.weight, "at least 0")

    def copies(self, observation: Observation) -> int:
        local, count = observation.local, observation.num_examples or 0
        return len(local.plan(count)) if local is not None and _ordered(observation) else 1

    def arrange(self, labels: Tensor, observation: Observation, seed: int, restarts: int) -> Tensor:
        if not _ordered(observation):
            return labels[None]
        return _shuffled(labels, self.copies(observation), seed, restarts)

    def update(self, batch: Batch, scene: Scene) -> Update:
        local, copies = scene.observation.local, self.copies(scene.observation)
        if local is None or scene.observation.num_clients > 1:
            return _one_step(batch, scene)
        B = len(batch.mask) // copies
        passes = [Batch(*(t[e * B : (e + 1) * B] for t in batch)) for e in range(copies)]
        return local.simulate(scene.victim, scene.observation.params, scene.observation.buffers, passes)

    def penalty(self, candidate: Candidate, scene: Scene) -> Tensor:
        copies = self.copies(scene.observation)
        means = torch.stack([x.mean(0) for x in candidate.pixels.chunk(copies)])
        # the mean over all ordered pairs of passes, a pass with itself included, is twice the variance
        apart: Tensor = 2 * means.var(0, correction=0).mean()
        return self.weight * apart

    def merge(self, pixels: Tensor, labels: Tensor, observation: Observation) -> tuple[Tensor, Tensor]:
        copies = self.copies(observation)
        first, *others = pixels.chunk(copies)
        own, *their = labels.chunk(copies)
        images, beliefs = [first], [own]
        for guesses, said in zip(others, their, strict=True):
            cost = torch.cdist(first.flatten(1), guesses.flatten(1)).square().double().nan_to_num(0.0, 0.0, 0.0)
            if labels.ndim == 1:
                cost = cost + (own[:, None] != said) * (1 + cost.sum())  # never between two labels if it can be helped
            chosen = torch.as_tensor(linear_sum_assignment(cost.cpu().numpy())[1], device=pixels.device)
            images.append(guesses[chosen])
            beliefs.append(said[chosen])
        return torch.stack(images).mean(0), own if labels.ndim == 1 else torch.stack(beliefs).mean(0)


def _one_step(batch: Batch, scene: Scene) -> Update:
    victim, seen = scene

    def loss(params: Update) -> Tensor:
        return victim.objective(params, seen.buffers, batch)[0]

    gradient: Update = torch.func.grad(loss)(seen.params)
    unit = update_unit(seen)
    return gradient if unit == 1 else {k: unit * g for k, g in gradient.items()}


def _ordered(observation: Observation) -> bool:
    """Whether it matters which examples meet in one step."""
    local, count = observation.local, observation.num_examples or 0
    return local is not None and observation.num_clients == 1 and any(len(steps) > 1 for steps in local.plan(count))


def _shuffled(labels: Tensor, copies: int, seed: int, restarts: int) -> Tensor:
    def drawn(restart: int, copy: int) -> Tensor:
        order = torch.randperm(len(labels), generator=stream(seed, "label_order", restart, copy))
        # sorted first: the order in which a threat model shows labels must not matter
        return labels.sort().values[order.to(labels.device)]

    return torch.stack([torch.cat([drawn(t, e) for e in range(copies)]) for t in range(restarts)])
