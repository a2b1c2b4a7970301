"""The network from an update to its images, and its training."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from gia_bench.attacks.base import Snapshots
from gia_bench.seeding import seeded, stream

log = logging.getLogger(__name__)


class Lesson(NamedTuple):
    """Updates with the images behind them. features: [N, size]; images: [N, B, pixels] in [0, 1]."""

    features: Tensor
    images: Tensor


class Lessons(Protocol):
    """Where lessons come from. ``training``: those of one epoch; ``held_out``: never trained on."""

    def training(self, epoch: int) -> Lesson: ...

    @property
    def held_out(self) -> Lesson: ...


class Course(NamedTuple):
    """How the network is trained: see ``LearnedInverter``."""

    hidden: int
    num_layers: int
    epochs: int
    batch_size: int
    learning_rate: float
    decay_at: float
    decay: float
    standardized: bool
    snapshot_every: int
    seed: int


class Inverter(NamedTuple):
    """A trained network. center, spread: [size], what features are brought to one scale with; error: the mean squared
    error on the lessons that were held out, infinite where it never was finite."""

    network: nn.Sequential
    center: Tensor
    spread: Tensor
    error: float

    @torch.no_grad()
    def __call__(self, features: Tensor, count: int) -> Tensor:
        """Images [n, B, pixels] of ``count`` examples each, from features [n, size]."""
        return _images(self.network, (features - self.center) / self.spread, count)


def train(lessons: Lessons, course: Course, snapshots: Snapshots, key: str) -> Inverter:
    """Adam on the mean squared error; the weights of the epoch with the lowest error on held-out lessons are kept.

    Goes on where a killed run left it, with the same result: the order in which an epoch's lessons are taken has a
    stream of its own.
    """
    first = lessons.training(0)
    count, pixels = first.images.shape[1:]
    network = _network(first.features.shape[1], count * pixels, course).to(first.features)
    optimizer = torch.optim.Adam(network.parameters(), lr=course.learning_rate)
    center, spread = _scale(first.features, course.standardized)
    held = Lesson((lessons.held_out.features - center) / spread, lessons.held_out.images)
    start, best, error = 0, copy.deepcopy(network.state_dict()), float("inf")
    saved = snapshots.load(key)
    if saved is not None:
        start, best, error = saved["epoch"], copy.deepcopy(saved["best"]), saved["error"]
        network.load_state_dict(saved["network"])
        optimizer.load_state_dict(copy.deepcopy(saved["optimizer"]))
    for epoch in range(start, course.epochs):
        for group in optimizer.param_groups:
            group["lr"] = course.learning_rate * (course.decay if epoch >= course.decay_at * course.epochs else 1)
        lesson = lessons.training(epoch)
        with torch.enable_grad():
            _epoch(network, optimizer, Lesson((lesson.features - center) / spread, lesson.images), course, epoch)
        now = _error(network, held, course.batch_size)
        log.debug("learned inverter: epoch %d, held-out mean squared error %.5f", epoch, now)
        if now < error:  # never true of NaN
            best, error = copy.deepcopy(network.state_dict()), now
        if (epoch + 1) % course.snapshot_every == 0 or epoch + 1 == course.epochs:
            snapshots.save(key, _packed(epoch + 1, network, optimizer, best, error))
    network.load_state_dict(best)
    return Inverter(network, center, spread, error)


def assigned_error(found: Tensor, truth: Tensor) -> Tensor:
    """[n]: the mean squared error of images [n, B, pixels] under the assignment of ``found`` to ``truth`` that makes it
    smallest (Hungarian method), since a batch has no order (Wu et al. 2023)."""
    if found.shape[1] > 1:
        with torch.no_grad():
            # sums over pixels order the pairs as means do
            cost = torch.cdist(truth.double(), found.double()).square().nan_to_num(0.0, 0.0, 0.0).cpu().numpy()
            taken = torch.stack([torch.as_tensor(linear_sum_assignment(one)[1]) for one in cost])
        found = found.take_along_dim(taken.to(found.device)[..., None], 1)
    return (found - truth).square().mean((1, 2))


def _network(size: int, out: int, course: Course) -> nn.Sequential:
    """Hidden layers with ReLU, and a sigmoid at the end: images lie in [0, 1]."""
    widths = [size] + [course.hidden] * course.num_layers
    layers: list[nn.Module] = []
    with seeded(course.seed, "inverter"):
        for a, b in pairwise(widths):
            layers += [nn.Linear(a, b), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(widths[-1], out), nn.Sigmoid())


def _images(network: nn.Sequential, features: Tensor, count: int) -> Tensor:
    images: Tensor = network(features)
    return images.view(len(images), count, -1)


def _scale(features: Tensor, standardized: bool) -> tuple[Tensor, Tensor]:
    if not standardized:
        return torch.zeros_like(features[0]), torch.ones_like(features[0])
    spread = features.std(0, correction=0)
    # an entry that hardly ever changes must not become the loudest one when it once does
    spread = spread.clamp(min=1e-3 * float(spread.max()))
    return features.mean(0), torch.where(spread > 0, spread, 1)


def _epoch(
    network: nn.Sequential, optimizer: torch.optim.Optimizer, lesson: Lesson, course: Course, epoch: int
) -> None:
    order = torch.randperm(len(lesson.features), generator=stream(course.seed, "lesson_order", epoch))
    order = order.to(lesson.features.device)
    for piece in _pieces(len(order), course.batch_size):
        optimizer.zero_grad()
        rows = order[piece]
        truth = lesson.images[rows]
        loss = assigned_error(_images(network, lesson.features[rows], truth.shape[1]), truth).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


@torch.no_grad()
def _error(network: nn.Sequential, lesson: Lesson, batch_size: int) -> float:
    errors = [
        assigned_error(_images(network, lesson.features[piece], lesson.images.shape[1]), lesson.images[piece])
        for piece in _pieces(len(lesson.features), batch_size)
    ]
    return float(torch.cat(errors).mean())


def _pieces(count: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, count, size)]


def _packed(
    epoch: int, network: nn.Sequential, optimizer: torch.optim.Optimizer, best: Mapping[str, Tensor], error: float
) -> dict[str, Any]:
    """A copy of all that changes during the training."""
    state = {"network": network.state_dict(), "optimizer": optimizer.state_dict(), "best": dict(best)}
    return {"epoch": epoch, "error": error, **copy.deepcopy(state)}
