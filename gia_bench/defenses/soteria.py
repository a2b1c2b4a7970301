"""Soteria: the head's input is perturbed where it says most about the image."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.func import vjp, vmap

from gia_bench.defenses.base import Client, Defense
from gia_bench.defenses.checks import check
from gia_bench.defenses.conv_chain import conv_chain
from gia_bench.errors import IncompatibleError
from gia_bench.models.functional import Head, Victim
from gia_bench.values import Batch, Noise, Observation, Shared, State, Update
from gia_bench.wire import SPARSE, Codec


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
    1e-10 (GGL, DGP). features_at_once: how many are differentiated together; changes memory, not numbers (and without
    effect for chains of convolutions on a CPU, whose lengths ``conv_chain`` computes without backward passes).

    Under FedAvg the scores are of all local steps' examples at the broadcast model; the paper has one gradient only.
    Raises ``IncompatibleError`` for a model without a linear head on a vector of features.
    """

    prune: float = 0.6
    epsilon: float = 0.1
    features_at_once: int = 64

    def __post_init__(self) -> None:
        check(
            "defense soteria: prune", self.prune, lambda s: 0 <= s <= 1, "lie in [0, 1]; it is a share, 0.6 means 60 %"
        )
        check("defense soteria: epsilon", self.epsilon, lambda e: 0 <= e < math.inf, "be finite and at least 0")
        check("defense soteria: features_at_once", self.features_at_once, lambda n: n >= 1, "be at least 1")

    @property
    def codec(self) -> Codec:
        """Without the dropped columns."""
        return SPARSE

    def check_victim(self, victim: Victim) -> None:
        """Needs a linear layer at the end."""
        if victim.head is None:
            raise _no_head()

    def protect(
        self, update: Update, client: Client, state: State, shared: Shared, noise: Noise
    ) -> tuple[Update, State]:
        """The update without the dropped columns. NaN and infinity stay, so that the server sees them."""
        head = client.victim.head
        if head is None:
            raise _no_head()
        steps = [Batch(*(t[s] for t in client.batch)) for s in range(client.batch.mask.shape[0])]
        scores = torch.stack([self._scores(client, head, step) for step in steps]).sum(0)
        weight = update[head.weight]
        kept = ~(scores.abs() < percentile(scores, self.prune)) | ~weight.isfinite()
        return update | {head.weight: torch.where(kept, weight, 0)}, state

    def surrogate(self, update: Update, observation: Observation) -> Update:
        """The dummy update without the columns that are zero in the observed last matrix (the head's)."""
        name = [k for k, u in observation.update.items() if u.ndim == 2][-1]
        seen = (observation.update[name] != 0).any(0)
        return update | {name: torch.where(seen, update[name], 0)}

    def _scores(self, client: Client, head: Head, batch: Batch) -> Tensor:
        """Scores [features] of one local step."""
        victim, inputs = client.victim, batch.inputs
        # on a GPU one batched backward pass is faster than many small matrix products
        chain = conv_chain(victim, head) if inputs.device.type == "cpu" else None
        if chain is None:
            r, d = self._backward(client, head, inputs)
        else:
            r, slopes = chain.features(client.params, _normalised(victim, inputs))
            d = torch.stack([chain.lengths(client.params, [s[b] for s in slopes]) for b in range(len(r))], 1)
        scores = torch.where(d == 0, 0, d / (r.T + self.epsilon))
        total: Tensor = (scores * batch.mask).sum(1)
        return total

    def _backward(self, client: Client, head: Head, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Features r [B, features] and ||d r / d x|| [features, B] of any model, by backward passes."""

        def represent(inputs: Tensor) -> Tensor:
            return features(client, head, inputs)

        r: Tensor
        r, backward = vjp(represent, inputs)  # type: ignore[misc]  # the third value comes with has_aux alone
        B, num_features = r.shape
        ones = torch.eye(num_features, dtype=r.dtype, device=r.device)

        def lengths(one: Tensor) -> Tensor:
            """||d r_f / d x|| [B]."""
            (pixels,) = backward(one.expand(B, num_features))
            length: Tensor = (pixels * _std(client.victim, pixels)).flatten(1).square().sum(1).sqrt()
            return length

        return r, vmap(lengths, chunk_size=int(self.features_at_once))(ones)


def features(client: Client, head: Head, inputs: Tensor) -> Tensor:
    """The head's inputs [B, features] for images [B, C, H, W] in [0, 1]."""
    layer = client.victim.module.get_submodule(head.weight.removesuffix("weight").removesuffix("."))
    seen: list[Tensor] = []

    def keep(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        seen.append(arguments[0])

    handle = layer.register_forward_pre_hook(keep)
    try:
        client.victim.logits(client.params, client.buffers, inputs)
    finally:
        handle.remove()
    if len(seen) != 1 or seen[0].ndim != 2:
        raise _no_head()
    return seen[0]


def percentile(scores: Tensor, share: float) -> Tensor:
    """numpy's percentile of scores [n], by linear interpolation; share in [0, 1]."""
    ordered = scores.sort().values
    place = share * (len(scores) - 1)
    low = math.floor(place)
    high = min(low + 1, len(scores) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def _normalised(victim: Victim, inputs: Tensor) -> Tensor:
    """Images in [0, 1] as the network sees them."""
    if victim.mean is None or victim.std is None:
        return inputs
    return (inputs - victim.mean.view(-1, 1, 1)) / victim.std.view(-1, 1, 1)


def _std(victim: Victim, like: Tensor) -> Tensor:
    """From d / d image to d / d normalised image [C, 1, 1]."""
    return like.new_ones(1) if victim.std is None else victim.std.to(like).view(-1, 1, 1)


def _no_head() -> IncompatibleError:
    return IncompatibleError(
        "defense soteria perturbs the input of the last linear layer, one vector per image, and the model has no such "
        "layer with one output per class; choose a model that ends in one (lenet, convnet64, resnet18)."
    )
