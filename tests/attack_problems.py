"""Small victims whose true images are known, for the tests of attacks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gia_bench.models.functional import Victim
from gia_bench.values import Batch, Observation


@dataclass(frozen=True, eq=False)
class Problem:
    victim: Victim
    observations: list[Observation]
    images: Tensor
    labels: Tensor


def sigmoid_net(
    shape: tuple[int, int, int], classes: int, width: int = 4, norm: nn.Module | None = None
) -> nn.Sequential:
    """DLG's kind of network: strided sigmoid convolutions and one linear layer, weights uniform in [-0.5, 0.5]."""
    C, H, W = shape
    middle = [norm] if norm is not None else []
    layers = [nn.Conv2d(C, width, 5, 2, 2), *middle, nn.Sigmoid(), nn.Conv2d(width, width, 5, 1, 2), nn.Sigmoid()]
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * (H // 2) * (W // 2), classes))
    for parameter in net.parameters():
        nn.init.uniform_(parameter, -0.5, 0.5)
    return net


def problem(
    victims: int,
    *,
    batch: int = 1,
    shape: tuple[int, int, int] = (1, 8, 8),
    classes: int = 4,
    width: int = 4,
    norm: nn.Module | None = None,
    module: nn.Module | None = None,
    normalised: bool = False,
    dtype: torch.dtype = torch.float32,
    **shown: Any,
) -> Problem:
    """Victims that sent the gradient of ``batch`` smooth images each, and the statistics of their BatchNorm layers.

    module: another network than ``sigmoid_net``; shown: more fields of the observations.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        C = shape[0]
        victim = Victim(
            module=(module or sigmoid_net(shape, classes, width, norm)).to(dtype),
            input_shape=shape,
            num_classes=classes,
            mean=torch.full((C,), 0.4, dtype=dtype) if normalised else None,
            std=torch.full((C,), 0.25, dtype=dtype) if normalised else None,
        )
        small = torch.rand(victims * batch, C, shape[1] // 4, shape[2] // 4, dtype=dtype)
        images = nn.functional.interpolate(small, shape[1:], mode="bilinear").view(victims, batch, *shape)
        labels = torch.randint(0, classes, (victims, batch))
    params, buffers = victim.initial()

    def send(x: Tensor, y: Tensor) -> Observation:
        sent = Batch(x, y, torch.ones(batch, dtype=dtype))
        update = torch.func.grad(lambda p: victim.objective(p, buffers, sent)[0])(params)
        own = victim.objective(params, buffers, sent)[1]
        return Observation(
            params=params, buffers=buffers, update=update, num_examples=batch, sent_buffers=own or None, **shown
        )

    return Problem(victim, [send(x, y) for x, y in zip(images, labels, strict=True)], images, labels)


def psnr_db(found: Tensor, truth: Tensor) -> Tensor:
    """Per image: [..., C, H, W] -> [...]."""
    error: Tensor = (found.clamp(0, 1) - truth).square().flatten(-3).mean(-1)
    return -10 * error.log10()


def double_backward_loss(victim: Victim, observation: Observation, images: Tensor, labels: Tensor) -> Tensor:
    """1 - cosine between the gradient of ``images`` and the observed update, by plain autograd, for one victim."""
    params = {k: v.detach().clone().requires_grad_() for k, v in observation.params.items()}
    batch = Batch(images, labels, torch.ones(len(images), dtype=images.dtype))
    loss = victim.objective(params, observation.buffers, batch)[0]
    dummy = torch.autograd.grad(loss, list(params.values()), create_graph=True)
    a = torch.cat([g.flatten() for g in dummy])
    b = torch.cat([observation.update[k].flatten() for k in params])
    cosine: Tensor = (a @ b) / (a.norm() * b.norm())
    return 1 - cosine


class Memory:
    """Snapshots that die after ``saves_to_live`` saves, and keep what was saved."""

    def __init__(self, saves_to_live: int | None = None) -> None:
        self.kept: dict[str, Mapping[str, Any]] = {}
        self.saves_to_live = saves_to_live

    def load(self, key: str) -> Mapping[str, Any] | None:
        return self.kept.get(key)

    def save(self, key: str, state: Mapping[str, Any]) -> None:
        self.kept[key] = state
        if self.saves_to_live is not None:
            self.saves_to_live -= 1
            if self.saves_to_live == 0:
                raise KeyboardInterrupt
