"""FedDST: clients prune and regrow their own masks from time to time, and the server makes one of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor

from gia_bench.defenses.checks import check
from gia_bench.defenses.selection import Mask, ranks
from gia_bench.errors import IncompatibleError
from gia_bench.models.functional import Victim
from gia_bench.pruning.base import Pruning, Testimony, Trained
from gia_bench.pruning.erk import erk_counts
from gia_bench.pruning.scores import check_density, prunable
from gia_bench.values import Batch, Examples, Params, State, Update
from gia_bench.wire import bits_of

if TYPE_CHECKING:
    from gia_bench.federated.work import LocalWork


@final
@dataclass(frozen=True, kw_only=True)
class FedDST(Pruning):
    """Dynamic sparse training in a federation (Bibikar et al., AAAI 2022), with S = 1 - density.

    Every ``interval`` rounds (after rounds interval - 1, 2 interval - 1, ...) a client that has trained prunes each
    layer by magnitude to the sparsity S + (1 - S) alpha_t and regrows it to S by the largest |gradient|; a weight that
    is dropped and grown again starts from 0. It sends its mask along; a weight becomes its mean over the clients that
    keep it, and the server prunes by magnitude to S again. alpha_t = alpha / 2 (1 + cos(pi t / t_end)). Layers have
    ERK densities.

    gia_bench choices: the first mask keeps the largest first weights; clients readjust after their last local step,
    with the gradient of their last step that has examples; equal magnitudes (the newly grown are 0) go to what more
    clients keep; no readjustment from t_end on. Other rounds use the announced mask.

    density: share kept, in (0, 1]; interval: rounds, at least 1; alpha: in [0, 1]; rounds: of the whole run; end: t_end
    as a share of ``rounds``, in (0, 1]. Raises ``IncompatibleError`` under FedSGD, where no client has own weights.
    """

    density: float = 0.2
    interval: int = 10
    alpha: float = 0.5
    rounds: int = 400
    end: float = 0.5

    def __post_init__(self) -> None:
        check_density("feddst", self.density)
        check("pruning feddst: interval", self.interval, lambda n: n >= 1 and n == int(n), "be a whole number above 0")
        check("pruning feddst: alpha", self.alpha, lambda a: 0 <= a <= 1, "lie in [0, 1]")
        check("pruning feddst: rounds", self.rounds, lambda n: n >= 1, "be at least 1")
        check("pruning feddst: end", self.end, lambda e: 0 < e <= 1, "lie in (0, 1]; it is a share of all rounds")

    def check_local(self, local: LocalWork) -> None:
        """Needs clients that train."""
        if local.learning_rate is None:
            raise IncompatibleError(
                "pruning feddst prunes a client's own trained weights, and under FedSGD it has none; choose fl=fedavg, "
                "or another pruning."
            )

    def start(self, victim: Victim, public: Examples) -> Mask:
        """The largest weights of every layer."""
        params, _ = victim.initial()
        counts = self._counts({name: params[name] for name in prunable(victim)}, 0.0)
        return {name: largest(params[name].abs(), count) for name, count in counts.items()}

    def strength(self, round_index: int) -> float | None:
        """alpha_t, after a round in which clients readjust."""
        t_end = self.end * self.rounds
        if (round_index + 1) % self.interval or round_index >= t_end:
            return None
        return self.alpha / 2 * (1 + math.cos(math.pi * round_index / t_end))

    def witness(self, seen: State, gradient: Update, batch: Batch) -> State:
        """The gradient of the last step with examples."""
        active = batch.mask.sum() > 0
        return {name: torch.where(active, g, seen[name]) if seen else g for name, g in gradient.items()}

    def asks(self, like: Params, masks: Mask) -> dict[str, Tensor]:
        """The client's own mask."""
        return {name: torch.zeros_like(mask) for name, mask in masks.items()}

    def testify(self, trained: Trained, strength: float | None) -> Testimony:
        """The readjusted mask, and the update of weights of which the dropped ones are 0."""
        if strength is None:
            return Testimony(trained.update, {}, trained.state)
        fewer, whole = self._counts(trained.masks, strength), self._counts(trained.masks, 0.0)
        own, update = {}, dict(trained.update)
        for name, mask in trained.masks.items():
            params = trained.params[name]
            kept = largest((params - update[name]).abs(), fewer[name], among=mask)
            own[name] = kept | largest(trained.seen[name].abs(), whole[name] - fewer[name], among=~kept)
            update[name] = torch.where(mask & ~kept, params, update[name])
        return Testimony(update, own, trained.state)

    def combine(self, aggregate: Update, evidence: dict[str, Tensor]) -> Update:
        """The mean over the clients that keep a weight, from the mean over all and the share that keeps it."""
        mean = dict(aggregate)
        for name, share in evidence.items():
            u = aggregate[name]
            mean[name] = torch.where(share > 0, u / share.to(u.dtype), 0)
        return mean

    def adjust(self, params: Params, masks: Mask, evidence: dict[str, Tensor], strength: float) -> Mask:
        """To the density again: the largest of the weights that any client keeps."""
        counts = self._counts(masks, 0.0)
        return {name: _pruned(params[name], evidence[name], count) for name, count in counts.items()}

    def _counts(self, like: Params | Mask, strength: float) -> dict[str, int]:
        shapes = {name: tuple(t.shape) for name, t in like.items()}
        return erk_counts(shapes, self.density * (1 - strength))


def largest(magnitudes: Tensor, count: int, *, among: Tensor | None = None) -> Tensor:
    """True for the ``count`` largest of the entries ``among`` (all); ties by position, the first one first."""
    row = bits_of(magnitudes).reshape(-1)
    if among is not None:
        row = row.masked_fill(~among.reshape(-1), -1)
    return ranks(row, 0, count).reshape(magnitudes.shape)


def _pruned(weights: Tensor, share: Tensor, count: int) -> Tensor:
    """The ``count`` largest weights; where they run out, zeros that the largest shares of clients keep."""
    held = share > 0
    trained = held & (weights != 0)
    first = min(count, int(trained.count_nonzero()))
    kept = largest(weights.abs(), first, among=trained)
    return kept | largest(share, count - first, among=held & ~trained)
