"""PruneFL's initial pruning: before round 0, one machine trains alone and fits the model's size to its task."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import torch
from torch.func import grad

from gia_bench.defenses.checks import check
from gia_bench.defenses.selection import Mask
from gia_bench.errors import IncompatibleError
from gia_bench.pruning.base import Begun
from gia_bench.seeding import stream
from gia_bench.values import Batch, Buffers, Examples, Params, Update

if TYPE_CHECKING:
    from gia_bench.models.functional import Victim

Adjust = Callable[[Params, Mask, Update], Mask]
"""(weights, masks, sums of squared gradients) -> the next masks."""
LOOK = 10
"""Rounds between two looks at the accuracy (PruneFL's code)."""


@final
@dataclass(frozen=True, kw_only=True)
class InitialPruning:
    """One machine takes plain SGD steps over the same ``batches`` batches, once through them a round, and adds up the
    squared gradients (Jiang et al., TNNLS 2022; numbers and rules of its code). Once it classifies these examples
    ``accuracy_factor`` times as well as guessing does, it adjusts the masks in that round and every ``interval`` rounds
    after it, each time by the first share of PruneFL and without a density limit, and forgets the sums. It stops after
    ``rounds`` rounds, or once the density changed by at most the share ``tolerance`` ``patience`` times in a row.
    Federated learning starts from its masks and its weights.

    PruneFL does this at one client, or at a server that has data. Here it is the server, on public examples, which must
    not be of the test split: a stand-in for the client, of which nothing private is used and nothing is sent. Other
    gia_bench choices: pruned weights stand still at 0 between adjustments; accuracy is that of evaluation mode;
    BatchNorm's statistics are not taken along. It is done anew when a run goes on after a break, with the same numbers.

    rounds: at most, 0 leaves it out (the authors': 1,000); batches, batch_size, interval, patience: at least 1;
    learning_rate: above 0; accuracy_factor, tolerance: at least 0; seed: of the choice of examples.
    """

    rounds: int = 0
    batches: int = 10
    batch_size: int = 20
    learning_rate: float = 0.25
    interval: int = 50
    accuracy_factor: float = 1.5
    tolerance: float = 0.1
    patience: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        where = "pruning prunefl: initial."
        check(where + "rounds", self.rounds, lambda n: n >= 0 and n % 1 == 0, "be a whole number of at least 0")
        for name in ("batches", "batch_size", "interval", "patience"):
            check(where + name, getattr(self, name), lambda n: n >= 1 and n % 1 == 0, "be a whole number above 0")
        check(where + "learning_rate", self.learning_rate, lambda r: 0 < r < math.inf, "be finite and above 0")
        for name in ("accuracy_factor", "tolerance"):
            check(where + name, getattr(self, name), lambda x: 0 <= x < math.inf, "be finite and at least 0")

    def run(self, victim: Victim, public: Examples, masks: Mask, adjust: Adjust) -> Begun:
        """Masks and weights for round 0. Raises ``IncompatibleError`` where public examples are too few."""
        params, buffers = victim.initial()
        data = self._data(public)
        sums = {k: torch.zeros_like(p) for k, p in params.items()}
        begun: int | None = None
        densities: list[float] = []
        for r in range(self.rounds):
            if begun is None and r % LOOK == 0 and self._has_learnt(victim, params, buffers, data):
                begun = r
            for batch in data:
                gradient, buffers = grad(victim.objective, has_aux=True)(params, buffers, batch)
                sums = {k: s + gradient[k].square() for k, s in sums.items()}
                params = _on({k: p - self.learning_rate * gradient[k] for k, p in params.items()}, masks)
            if begun is not None and (r - begun) % self.interval == 0:
                masks = adjust(params, masks, sums)
                params, sums = _on(params, masks), {k: torch.zeros_like(s) for k, s in sums.items()}
                densities.append(sum(int(m.sum()) for m in masks.values()) / sum(m.numel() for m in masks.values()))
                if has_settled(densities, self.tolerance, self.patience):
                    break
        return Begun(masks, params)

    def _data(self, public: Examples) -> list[Batch]:
        wanted = self.batches * self.batch_size
        if len(public) < wanted:
            raise IncompatibleError(
                f"pruning prunefl: the initial stage trains on {wanted} public examples, and there are {len(public)}; "
                "leave public.indices=null, take fewer (pruning.initial.batches, batch_size), or none "
                "(pruning.initial.rounds=0)."
            )
        chosen = torch.randperm(len(public), generator=stream(self.seed, "pruning", "initial"))[:wanted]
        return [
            Batch(public.images(rows), public.labels[rows], torch.ones(len(rows)))
            for rows in torch.split(chosen, self.batch_size)
        ]

    def _has_learnt(self, victim: Victim, params: Params, buffers: Buffers, data: list[Batch]) -> bool:
        right = 0
        for batch in data:
            logits, _ = victim.logits(params, buffers, batch.inputs, training=False)
            right += int((logits.argmax(-1) == batch.labels).sum())
        return right * victim.num_classes >= self.accuracy_factor * self.batches * self.batch_size


def has_settled(densities: Sequence[float], tolerance: float, patience: int) -> bool:
    """Whether each of the last ``patience`` densities is the one before it up to the share ``tolerance``."""
    rests = [abs(now - before) <= tolerance * before for before, now in itertools.pairwise(densities)]
    return len(rests) >= patience and all(rests[-patience:])


def _on(params: Params, masks: Mask) -> Params:
    return {k: torch.where(masks[k], p, 0) if k in masks else p for k, p in params.items()}
