"""How much of an observed gradient an image leaves unexplained: a score for attacks that do not search."""

from __future__ import annotations

import torch
from torch import Tensor

from gia_bench.models.functional import Victim
from gia_bench.values import Batch, Observation, Params, Update


def on_host(tensors: Params) -> Params:
    """The same tensors for algebra: float64 on the CPU, where every solver is."""
    return {k: v.detach().to("cpu", torch.float64) for k, v in tensors.items()}


def unexplained(observation: Observation, victim: Victim, gradient: Update, inputs: Tensor, labels: Tensor) -> float:
    """The share of the gradient's energy that remains when the gradient of ``inputs`` [B, C, H, W] in [0, 1] with
    ``labels`` (classes or probabilities) is taken off it; infinite where the image is not finite. gradient: float64 on
    the CPU.
    """
    if not inputs.isfinite().all():
        return float("inf")
    victim, buffers = victim.to(torch.device("cpu")), on_host(observation.buffers)
    batch = Batch(inputs, labels, torch.ones(len(inputs), dtype=torch.float64))
    made = torch.func.grad(lambda p: victim.objective(p, buffers, batch)[0])(on_host(observation.params))
    left = torch.stack([(made[k] - g).square().sum() for k, g in gradient.items()]).sum()
    whole = torch.stack([g.square().sum() for g in gradient.values()]).sum()
    return float(left / whole.clamp(min=torch.finfo(torch.float64).tiny))
