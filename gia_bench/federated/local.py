"""What a client does with its own data in one round: one gradient (FedSGD), or local steps (FedAvg)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from torch import Tensor

from gia_bench.defenses.base import Defense
from gia_bench.defenses.none import NoDefense
from gia_bench.errors import ConfigError
from gia_bench.federated.sampling import (
    POISSON,
    SHUFFLED,
    check_held,
    check_sampling,
    poisson,
    poisson_rate,
    scaled,
    share_of_expected,
)
from gia_bench.federated.steps import decay, loss_of, step_of
from gia_bench.federated.work import LocalResult, LocalWork
from gia_bench.models.functional import Victim
from gia_bench.seeding import stream
from gia_bench.values import Batch, Buffers, Noise, Params, Update

UNDEFENDED = NoDefense()


class _Walk(NamedTuple):
    """Where local SGD stands: weights, momentum, buffers, and what each step found."""

    weights: Params
    velocity: Params
    buffers: Buffers
    losses: tuple[Tensor, ...] = ()
    active: tuple[Tensor, ...] = ()


@final
@dataclass(frozen=True, kw_only=True)
class FedSGD:
    """One gradient on one batch per round.

    batch_size: examples per client and round; None for all that the client holds. sampling: "shuffled": batches walk
    through a client's shuffled data without replacement; "poisson": every example is in a batch by itself, with the
    chance batch_size / examples, as the accountants of DP-SGD assume. The update is then the batch's sum over
    ``batch_size``, that of an empty batch too, and counts as ``batch_size`` examples in the mean.
    """

    batch_size: int | None = 8
    sampling: str = SHUFFLED

    def __post_init__(self) -> None:
        check_sampling(self.sampling, self.batch_size)

    @property
    def learning_rate(self) -> float | None:
        """A gradient has no step size."""
        return None

    def at(self, round_index: int) -> LocalWork:
        """The same in every round."""
        return self

    def schedule(self, num_examples: int, seed: int, round_index: int, client: int) -> list[Tensor]:
        """One step: the ``round_index``-th batch of the client's walk, or that round's draw; pure in its arguments."""
        size = check_held(self.batch_size, num_examples, client)
        if self.sampling == POISSON:
            return [poisson(num_examples, size, stream(seed, "poisson", round_index, client, 0))]
        epoch, place = divmod(round_index, num_examples // size)
        order = torch.randperm(num_examples, generator=stream(seed, "batch", client, epoch))
        return [order[place * size : (place + 1) * size]]

    def weight(self, num_examples: int, steps: Sequence[Tensor]) -> int:
        """The batch size, which of a Poisson batch is the expected one: what it really is says who is in it."""
        return self.batch_size or num_examples

    def poisson_rate(self, num_examples: int) -> float | None:
        """batch_size / examples."""
        return poisson_rate(self.sampling, self.batch_size, num_examples)

    def run(
        self, victim: Victim, defense: Defense, params: Params, buffers: Buffers, batch: Batch, noise: Noise,
        counts: Sequence[int] | None,
    ) -> LocalResult:  # fmt: skip
        """The gradient of the mean loss, or of the sum over the expected number of examples."""
        own = step_of(batch, 0, counts)
        gradient, after, loss = defense.gradient(loss_of(victim, buffers), params, own, noise, 0)
        share = share_of_expected(own, self.sampling, self.batch_size)
        return LocalResult(scaled(gradient, share), after, share * loss)

    def plan(self, num_examples: int) -> list[list[slice]]:
        """One pass of one step: all the examples that the update stands for."""
        return [[slice(0, num_examples)]]

    def scale(self, num_examples: int) -> float:
        """1: the gradient itself; of a Poisson batch, its share of the expected number."""
        return num_examples / self.batch_size if self.sampling == POISSON and self.batch_size else 1.0

    def multiple(self, num_examples: int) -> float | None:
        """``scale``: there is one gradient and nothing else."""
        return self.scale(num_examples)

    def simulate(self, victim: Victim, params: Params, buffers: Buffers, passes: Sequence[Batch]) -> Update:
        """The gradient of the mean loss over the first pass, times ``scale``."""
        gradient = UNDEFENDED.gradient(loss_of(victim, buffers), params, passes[0], {}, 0)[0]
        return scaled(gradient, self.scale(passes[0].mask.shape[0]))


@final
@dataclass(frozen=True, kw_only=True)
class FedAvg:
    """Local SGD; the update is server - client weights (a pseudo-gradient for the server's optimizer).

    epochs: passes over the client's data, or steps: a fixed number of local steps (exactly one of the two);
    batch_size: None for all of a client's data; milestones: rounds from which ``learning_rate`` is multiplied by
    ``gamma``, one factor for all or one per milestone. sampling: "shuffled" passes, or "poisson": every example is in
    each of the ``steps`` by itself, with the chance batch_size / examples, and a step takes their sum over
    ``batch_size``, an empty one too.
    """

    learning_rate: float = 0.1
    epochs: int | None = 1
    steps: int | None = None
    batch_size: int | None = 8
    momentum: float = 0.0
    weight_decay: float = 0.0
    milestones: Sequence[int] = ()
    gamma: float | Sequence[float] = 0.1
    sampling: str = SHUFFLED

    def __post_init__(self) -> None:
        decay(self.milestones, self.gamma, 0)
        if (self.epochs is None) == (self.steps is None):
            raise ConfigError(
                f"fl.local needs exactly one of epochs and steps, got epochs={self.epochs} and steps={self.steps}; "
                "set the other one to null."
            )
        if (self.epochs or self.steps or 0) < 1 or not self.learning_rate > 0:
            raise ConfigError(
                f"fl.local needs at least one step and a positive learning rate, got epochs={self.epochs}, "
                f"steps={self.steps}, learning_rate={self.learning_rate}."
            )
        check_sampling(self.sampling, self.batch_size)
        if self.sampling == POISSON and self.steps is None:
            raise ConfigError(
                "fl.local.sampling=poisson draws every step anew and knows no passes over the data; give the number of "
                "local steps: fl.local.epochs=null fl.local.steps=..."
            )

    def at(self, round_index: int) -> LocalWork:
        """The learning rate after the milestones that have passed."""
        factor = decay(self.milestones, self.gamma, round_index)
        return dataclasses.replace(self, learning_rate=self.learning_rate * factor, milestones=(), gamma=1.0)

    def schedule(self, num_examples: int, seed: int, round_index: int, client: int) -> list[Tensor]:
        """Shuffled passes over the client's data, of which the last batch may be smaller; or a draw for every step."""
        size = check_held(self.batch_size, num_examples, client)
        if self.sampling == POISSON:
            draws = [stream(seed, "poisson", round_index, client, step) for step in range(self.steps or 0)]
            return [poisson(num_examples, size, draw) for draw in draws]
        batches: list[Tensor] = []
        for epoch, places in enumerate(self.plan(num_examples)):
            order = torch.randperm(num_examples, generator=stream(seed, "batch", round_index, client, epoch))
            batches.extend(order[place] for place in places)
        return batches

    def weight(self, num_examples: int, steps: Sequence[Tensor]) -> int:
        """All that the client holds (FedAvg's n_k)."""
        return num_examples

    def poisson_rate(self, num_examples: int) -> float | None:
        """batch_size / examples."""
        return poisson_rate(self.sampling, self.batch_size, num_examples)

    def run(
        self, victim: Victim, defense: Defense, params: Params, buffers: Buffers, batch: Batch, noise: Noise,
        counts: Sequence[int] | None,
    ) -> LocalResult:  # fmt: skip
        """SGD with momentum and weight decay as in ``torch.optim.SGD``; a shuffled step of nobody changes nothing."""
        walk = self._start(params, buffers)
        for s in range(batch.mask.shape[0]):
            own = step_of(batch, s, counts)
            walk = self._step(walk, victim, defense, own, noise, share_of_expected(own, self.sampling, self.batch_size))
        loss = torch.stack(walk.losses).sum() / torch.stack(walk.active).sum().clamp(min=1)
        return LocalResult({k: params[k] - w for k, w in walk.weights.items()}, walk.buffers, loss)

    def plan(self, num_examples: int) -> list[list[slice]]:
        """Passes of ``batch_size`` examples a step; the last step of a pass takes what is left, and with ``steps`` the
        last pass stops early. Of Poisson steps nobody else knows who is in which: each is one pass over all."""
        if self.sampling == POISSON:
            return [[slice(0, num_examples)]] * (self.steps or 0)
        size = min(self.batch_size or num_examples, num_examples)
        one = [slice(start, min(start + size, num_examples)) for start in range(0, num_examples, size)]
        total = self.steps if self.steps is not None else len(one) * (self.epochs or 0)
        return [one[: total - done] for done in range(0, total, len(one))]

    def scale(self, num_examples: int) -> float:
        """The learning rate times the number of steps; with momentum, each step counts in all that follow it."""
        steps = sum(len(places) for places in self.plan(num_examples))
        each = sum(self.momentum ** (s - t) for s in range(steps) for t in range(s + 1))
        return self.learning_rate * each * self._guess(num_examples)

    def multiple(self, num_examples: int) -> float | None:
        """None: even one step is the difference of two rounded weights."""
        return None

    def simulate(self, victim: Victim, params: Params, buffers: Buffers, passes: Sequence[Batch]) -> Update:
        """The same steps as ``run`` takes, in the order of ``passes``."""
        walk = self._start(params, buffers)
        for epoch, places in enumerate(self.plan(passes[0].mask.shape[0])):
            data = passes[min(epoch, len(passes) - 1)]
            for place in places:
                batch = Batch(*(t[place] for t in data))
                walk = self._step(walk, victim, UNDEFENDED, batch, {}, self._guess(len(batch.mask)))
        return {k: params[k] - w for k, w in walk.weights.items()}

    def _guess(self, num_examples: int) -> float:
        """``share_of_expected`` of a step, to those who know how many examples took part in the whole update: of one
        step that is all; of several, the mean over them is taken for a batch of the expected size."""
        alone = self.sampling == POISSON and self.steps == 1 and self.batch_size
        return num_examples / alone if alone else 1.0

    def _start(self, params: Params, buffers: Buffers) -> _Walk:
        return _Walk(params, {k: torch.zeros_like(v) for k, v in params.items()}, buffers)

    def _step(
        self, walk: _Walk, victim: Victim, defense: Defense, batch: Batch, noise: Noise, share: Tensor | float
    ) -> _Walk:
        weights, velocity, buffers = walk.weights, walk.velocity, walk.buffers
        gradient, after, loss = defense.gradient(loss_of(victim, buffers), weights, batch, noise, len(walk.losses))
        # a shuffled step without examples is one that the client does not take; a Poisson step is taken whoever is in
        active = batch.mask.sum() > (0 if self.sampling == SHUFFLED else -1)
        gradient = scaled(gradient, share)
        decayed = {k: gradient[k] + self.weight_decay * w for k, w in weights.items()}
        moved = {k: self.momentum * v + decayed[k] for k, v in velocity.items()}
        return _Walk(
            weights={k: torch.where(active, w - self.learning_rate * moved[k], w) for k, w in weights.items()},
            velocity={k: torch.where(active, moved[k], v) for k, v in velocity.items()},
            buffers={k: torch.where(active, after[k], v) for k, v in buffers.items()},
            losses=(*walk.losses, share * loss * active),
            active=(*walk.active, active),
        )
