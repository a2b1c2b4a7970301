"""Soteria: the head's input is perturbed where it says most about the image."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor

from gia_bench.defenses.base import Client, Defense
from gia_bench.defenses.checks import check
from gia_bench.defenses.conv_chain import conv_chain
from gia_bench.defenses.feature_lengths import by_backward, by_directions, no_head, normalised
from gia_bench.defenses.per_example import per_example
from gia_bench.models.functional import Head, Victim
from gia_bench.values import Batch, Noise, Observation, Params, Shared, State, Update
from gia_bench.wire import SPARSE, Codec

if TYPE_CHECKING:
    from gia_bench.federated.work import LocalWork


@final
@dataclass(frozen=True, kw_only=True)
class Soteria(Defense):
    """Zeroes the columns of the last linear layer's gradient whose features have the lowest scores (Sun et al. 2021).

    Also called PLD. A feature's score is the sum over the examples of ||d r_f / d x||_2 / (r_f + epsilon), x being the
    image as the network sees it and r the layer's input; features whose |score| lies below the ``prune`` percentile
    (numpy's, of the scores with their signs) are dropped. As in the authors' code the division is by r_f, not |r_f|,
    so signed features can turn the order around, and the layer's bias is not touched. A feature that no pixel moves
    scores 0, which at epsilon 0 is a gia_bench choice (0 / 0).

    prune: share in [0, 1]: 0.01 (authors' DLG notebook), 0.1 (GGL), 0.5 (Plato), 0.6 (authors' ConvNet example),
    0.8 (DGP), 0.6 and 0.8 (GradDefense's PLD). epsilon: >= 0: 0.1 (authors' ConvNet example), 0 (their DLG notebook),
    1e-10 (GGL, DGP). directions: None for the exact lengths, which are the paper's; a number for estimates of them, a
    gia_bench choice for clients who cannot pay one backward pass per feature: the root mean square of (d r_f / d x) v
    over so many random directions v, standard normal and drawn for every example of every local step.
    features_at_once: how many features are differentiated, or directions followed, together; changes memory, not
    numbers (and without effect for the exact lengths of chains of convolutions on a CPU, which ``conv_chain`` computes
    without backward passes).

    Under FedAvg the scores are of all local steps' examples at the broadcast model; the paper has one gradient only.
    Raises ``IncompatibleError`` for a model without a linear head on a vector of features.
    """

    prune: float = 0.6
    epsilon: float = 0.1
    directions: int | None = None
    features_at_once: int = 64

    def __post_init__(self) -> None:
        check(
            "defense soteria: prune", self.prune, lambda s: 0 <= s <= 1, "lie in [0, 1]; it is a share, 0.6 means 60 %"
        )
        check("defense soteria: epsilon", self.epsilon, lambda e: 0 <= e < math.inf, "be finite and at least 0")
        if self.directions is not None:
            check(
                "defense soteria: directions", self.directions, lambda n: n >= 1 and float(n).is_integer(),
                "be a whole number of at least 1, or null for the exact lengths",
            )  # fmt: skip
        check(
            "defense soteria: features_at_once",
            self.features_at_once,
            lambda n: n >= 1 and n == int(n),
            "be a whole number of at least 1",
        )

    @property
    def codec(self) -> Codec:
        """Without the dropped columns."""
        return SPARSE

    def check_victim(self, victim: Victim) -> None:
        """Needs a linear layer at the end."""
        if victim.head is None:
            raise no_head()

    def remark(self, local: LocalWork) -> str | None:
        """Its paper perturbs the representation behind one gradient."""
        if local.learning_rate is None:
            return None
        return (
            "defense soteria: its paper protects one gradient; here the change of the weights over local steps loses "
            "its columns, chosen at the broadcast model. What holds for fl=fedsgd need not hold here."
        )

    def draw(self, like: Params, batch: Batch, generator: torch.Generator) -> Noise:
        """``directions``: standard normal numbers [S, B, directions, C, H, W], 0 at padding, float32 on the CPU. Exact
        lengths need none."""
        if self.directions is None:
            return {}
        shape = (int(self.directions), *batch.inputs.shape[2:])

        def of(examples: int) -> Noise:
            return {"directions": torch.randn(examples, *shape, generator=generator)}

        return per_example(batch.mask, of, {"directions": 0})

    def protect(
        self, update: Update, client: Client, state: State, shared: Shared, noise: Noise
    ) -> tuple[Update, State]:
        """The update without the dropped columns. NaN and infinity stay, so that the server sees them; where a score is
        NaN, nobody can say what to drop, and the whole matrix becomes NaN."""
        head = client.victim.head
        if head is None:
            raise no_head()
        steps = [Batch(*(t[s] for t in client.batch)) for s in range(client.batch.mask.shape[0])]
        scores = torch.stack([self._scores(client, head, step, noise, s) for s, step in enumerate(steps)]).sum(0)
        weight = torch.where(scores.isnan().any(), torch.nan, update[head.weight])
        kept = ~(scores.abs() < percentile(scores, self.prune)) | ~weight.isfinite()
        return update | {head.weight: torch.where(kept, weight, 0)}, state

    def surrogate(self, update: Update, observation: Observation) -> Update:
        """The dummy update without the columns that are zero in the observed last matrix (the head's)."""
        name = [k for k, u in observation.update.items() if u.ndim == 2][-1]
        seen = (observation.update[name] != 0).any(0)
        return update | {name: torch.where(seen, update[name], 0)}

    def _scores(self, client: Client, head: Head, batch: Batch, noise: Noise, step: int) -> Tensor:
        """Scores [features] of one local step."""
        if self.directions is None:
            r, d = self._exact(client, head, batch.inputs)
        else:
            own = noise["directions"][step].to(batch.inputs)
            r, d = by_directions(client, head, batch.inputs, own, int(self.features_at_once))
        scores = torch.where(d == 0, 0, d / (r.T + self.epsilon))
        total: Tensor = (scores * batch.mask).sum(1)
        return total

    def _exact(self, client: Client, head: Head, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Features r [B, features] and ||d r / d x|| [features, B]."""
        # on a GPU one batched backward pass is faster than many small matrix products
        chain = conv_chain(client.victim, head) if inputs.device.type == "cpu" else None
        if chain is None:
            return by_backward(client, head, inputs, int(self.features_at_once))
        r, slopes = chain.features(client.params, normalised(client.victim, inputs))
        return r, torch.stack([chain.lengths(client.params, [s[b] for s in slopes]) for b in range(len(r))], 1)


def percentile(scores: Tensor, share: float) -> Tensor:
    """numpy's percentile of scores [n], by linear interpolation, but infinite between two infinite ones; share in
    [0, 1]."""
    ordered = scores.sort().values
    place = share * (len(scores) - 1)
    low = math.floor(place)
    high = min(low + 1, len(scores) - 1)
    below, above = ordered[low], ordered[high]
    if place == low:
        return below
    return torch.where(below == above, below, below + (place - low) * (above - below))
