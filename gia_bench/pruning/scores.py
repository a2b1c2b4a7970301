"""From scores to masks: which tensors can be pruned, the global threshold, the steps on the way to a density."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor, nn

from gia_bench.defenses.checks import check
from gia_bench.defenses.selection import Mask, exact
from gia_bench.errors import ConfigError, IncompatibleError, choices
from gia_bench.models.functional import Victim
from gia_bench.rows import joined
from gia_bench.seeding import stream
from gia_bench.values import Batch, Buffers, Examples, Params

Scores: TypeAlias = dict[str, Tensor]
"""By the names of the prunable parameters, of their shapes; what has a low score is pruned."""

SCHEDULES: dict[str, Callable[[float, float], float]] = {
    "exponential": lambda density, done: density**done,
    "linear": lambda density, done: 1 - (1 - density) * done,
}
"""(final density, share of the epochs that is done) -> density."""

EXAMPLES_PER_CLASS, PRUNE_BATCH = 10, 256
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def prunable(victim: Victim, *, bias: bool = False) -> list[str]:
    """Names of the weights (and biases) of linear layers and convolutions, in the model's order.

    BatchNorm's parameters and weights of other layers are never pruned. Raises ``IncompatibleError`` for a model
    without such a layer.
    """
    own = {id(m.weight) for m in victim.module.modules() if isinstance(m, LAYERS)}
    if bias:
        own |= {id(m.bias) for m in victim.module.modules() if isinstance(m, LAYERS) and m.bias is not None}
    names = [name for name, p in victim.module.named_parameters() if id(p) in own]
    if not names:
        raise IncompatibleError(
            "pruning takes weights of linear layers and convolutions, and the model has none; choose another model, or "
            "pruning=none."
        )
    return names


def everything(params: Params, names: list[str]) -> Mask:
    """Masks of these parameters that leave nothing out."""
    return {name: torch.ones_like(params[name], dtype=torch.bool) for name in names}


def above_threshold(scores: Scores, density: float) -> Mask:
    """Keeps the scores above the k-th smallest of all together, k = floor((1 - density) N).

    Scores that equal the threshold fall with it (Synaptic-Flow's rule), so that ties can cost more than k entries.
    """
    row = joined(scores)
    k = math.floor((1 - exact(density)) * row.numel())
    threshold = row.kthvalue(k).values if k else row.new_tensor(-math.inf)
    return {name: s > threshold if k else torch.ones_like(s, dtype=torch.bool) for name, s in scores.items()}


def pruned_in_steps(
    params: Params,
    names: list[str],
    scores: Callable[[Params, int], Scores],
    *,
    density: float,
    epochs: int,
    schedule: str,
) -> Mask:
    """Scores the weights that are left and cuts to the schedule's density, ``epochs`` times.

    scores: (all parameters, pruned ones 0, the epoch) -> scores. What is pruned never comes back: its score counts as
    minus infinity (gia_bench choice; only GraSP's and random scores of pruned weights are not the lowest anyway).
    """
    masks = everything(params, names)
    for epoch in range(epochs):
        left = params | {name: torch.where(mask, params[name], 0) for name, mask in masks.items()}
        found = {n: torch.where(masks[n], s, -math.inf) for n, s in scores(left, epoch).items()}
        masks = above_threshold(found, SCHEDULES[schedule](density, (epoch + 1) / epochs))
    return masks


def public_batches(public: Examples, num_classes: int, seed: int) -> list[Batch]:
    """10 public examples per class on average, drawn without replacement, in batches of at most 256.

    Raises ``IncompatibleError`` where there are not as many.
    """
    wanted = EXAMPLES_PER_CLASS * num_classes
    if len(public) < wanted:
        raise IncompatibleError(
            f"pruning scores weights on {wanted} public examples ({EXAMPLES_PER_CLASS} per class), and there are "
            f"{len(public)}; leave public.indices=null, or take pruning=random or synflow, which need none."
        )
    chosen = torch.randperm(len(public), generator=stream(seed, "pruning", "examples"))[:wanted]
    return [
        Batch(public.images(rows), public.labels[rows], torch.ones(len(rows)))
        for rows in torch.split(chosen, PRUNE_BATCH)
    ]


def mean_loss(victim: Victim, params: Params, buffers: Buffers, batch: Batch, temperature: float = 1.0) -> Tensor:
    """The clients' loss in evaluation mode, of logits / temperature."""
    logits, _ = victim.logits(params, buffers, batch.inputs, training=False)
    return victim.loss(logits / temperature, batch.labels).mean()


def check_cut(name: str, density: float, epochs: int, schedule: str) -> None:
    """Raises ``ConfigError`` for a density outside (0, 1], less than one epoch, or an unknown schedule."""
    check_density(name, density)
    check(f"pruning {name}: epochs", epochs, lambda e: e >= 1 and e == int(e), "be a whole number of at least 1")
    if schedule not in SCHEDULES:
        raise ConfigError(choices(f"pruning {name}: schedule", schedule, SCHEDULES))


def check_density(name: str, density: float) -> None:
    """Raises ``ConfigError`` for a density outside (0, 1]."""
    check(
        f"pruning {name}: density",
        density,
        lambda d: 0 < d <= 1,
        "lie in (0, 1]; it is the share that is kept",
    )
