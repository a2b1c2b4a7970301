"""How much each of a model's tensors says about the images: the risk by which GradDefense cuts its slices."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, final

import torch
from torch import Tensor

from gia_bench.defenses.checks import check
from gia_bench.errors import ConfigError, IncompatibleError, NonFiniteError, choices
from gia_bench.seeding import stream
from gia_bench.values import Batch, Buffers, Examples, Params

if TYPE_CHECKING:
    from gia_bench.models.functional import Victim

DIRECTIONS = ("ones", "random")


class Risk(Protocol):
    """The leakage risk of every parameter tensor."""

    def calibrate(self, victim: Victim, public: Examples) -> Risk:
        """The same risk with the public examples that it needs."""
        ...

    def due(self, round_index: int) -> bool:
        """Whether it is measured in this round; in others the last round's stays."""
        ...

    def measure(self, params: Params, round_index: int, generator: torch.Generator) -> Tensor:
        """[tensors] float64 on the parameters' device, at least 0 and finite, in the model's order."""
        ...


@final
@dataclass(frozen=True)
class LayerSize:
    """A tensor's risk is the number of its entries, so slices are of equal size: the paper's control."""

    def calibrate(self, victim: Victim, public: Examples) -> Risk:
        """Needs no examples."""
        return self

    def due(self, round_index: int) -> bool:
        """Sizes cost nothing."""
        return True

    def measure(self, params: Params, round_index: int, generator: torch.Generator) -> Tensor:
        """The sizes."""
        some = next(iter(params.values()))
        return torch.tensor([p.numel() for p in params.values()], dtype=torch.float64, device=some.device)


@final
@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """R_l = mean over public examples X_i of ||J_l(X_i)||, J_l the derivative of tensor l's gradient by the image.

    Wang et al. 2022 (GradDefense), equations 1 and 2. directions: "ones", as in the released code, the norm of
    1^T J_l: what the image moves in the sum of the tensor's gradient. Under softmax cross-entropy the last layer's
    gradients sum to 0 for every image, so that its risk is 0 and it lies in the last slice, whole. "random": the
    Frobenius norm of J_l itself, estimated from ``num_directions`` vectors of random signs at as many times the cost.

    root_size: public examples; class_bias: the probability with which each of them is drawn from one class, which
    ``root_seed`` chooses (else from all others), in [0, 1]; 0.1 is unbiased for ten classes; None: all examples are
    equally likely. What the paper's bias means beyond its name is a gia_bench choice. every: rounds between two
    measurements, the first in round 0, each with that round's parameters. The buffers are those of the published model.

    Raises ``IncompatibleError`` where there are too few public examples.
    """

    root_size: int = 100
    class_bias: float | None = None
    root_seed: int = 0
    every: int = 1
    directions: str = "ones"
    num_directions: int = 8

    def __post_init__(self) -> None:
        where = "defense graddefense: risk."
        for key in ("root_size", "every", "num_directions"):
            check(where + key, getattr(self, key), lambda n: n >= 1 and n == int(n), "be a whole number of at least 1")
        if self.class_bias is not None:
            check(where + "class_bias", self.class_bias, lambda p: 0 <= p <= 1, "lie in [0, 1], or be null")
        if self.directions not in DIRECTIONS:
            raise ConfigError(choices(where + "directions", self.directions, DIRECTIONS))

    def calibrate(self, victim: Victim, public: Examples) -> Risk:
        """Draws the root set."""
        rows = self.draw_root(public.labels, victim.num_classes)
        images = public.images(rows)
        return Rooted(self, victim, Batch(images, public.labels[rows], torch.ones(len(rows))))

    def draw_root(self, labels: Tensor, num_classes: int) -> Tensor:
        """Places [root_size] of the root set among examples with these labels [N], without repetition."""
        generator = stream(self.root_seed, "root")
        if self.class_bias is None:
            return self._take(torch.arange(len(labels)), self.root_size, "examples", generator)
        favoured = int(torch.randint(num_classes, (), generator=generator))
        from_it = int((torch.rand(self.root_size, generator=generator, dtype=torch.float64) < self.class_bias).sum())
        inside = labels == favoured
        own = self._take(torch.nonzero(inside).view(-1), from_it, f"examples of class {favoured}", generator)
        others = f"examples outside class {favoured}"
        rest = self._take(torch.nonzero(~inside).view(-1), self.root_size - from_it, others, generator)
        return torch.cat([own, rest])

    def _take(self, rows: Tensor, count: int, what: str, generator: torch.Generator) -> Tensor:
        if count > len(rows):
            raise IncompatibleError(
                f"defense graddefense needs {count} public {what} for its root set, and there are {len(rows)}; "
                f"lower defense.risk.root_size={self.root_size}, or make more public (public.split=test, "
                "public.indices=null)."
            )
        return rows[torch.randperm(len(rows), generator=generator)[:count]]

    def due(self, round_index: int) -> bool:
        """Every so many rounds."""
        return round_index % self.every == 0

    def measure(self, params: Params, round_index: int, generator: torch.Generator) -> Tensor:
        """Without a root set there is nothing to measure on."""
        raise ConfigError(
            "defense graddefense has no root set yet: call calibrate(victim, public) before the first round, as a "
            "composed run does."
        )


@final
@dataclass(frozen=True, eq=False)
class Rooted:
    """A ``Sensitivity`` with its root set: what ``calibrate`` gives. root: [root_size, ...]."""

    settings: Sensitivity
    victim: Victim
    root: Batch

    def calibrate(self, victim: Victim, public: Examples) -> Risk:
        """Draws anew."""
        return self.settings.calibrate(victim, public)

    def due(self, round_index: int) -> bool:
        """As its settings say."""
        return self.settings.due(round_index)

    def measure(self, params: Params, round_index: int, generator: torch.Generator) -> Tensor:
        """At these parameters; raises ``NonFiniteError`` naming round and tensors."""
        device = next(iter(params.values())).device
        buffers = {k: b.to(device) for k, b in self.victim.initial()[1].items()}
        root = Batch(*(t.to(device) for t in self.root))
        found = sensitivity(self.victim.to(device), params, buffers, root, self._directions(params, generator))
        broken = [name for name, r in zip(params, found.tolist(), strict=True) if not math.isfinite(r)]
        if broken:
            raise NonFiniteError(
                f"Round {round_index}: graddefense finds NaN or infinity as the sensitivity of {', '.join(broken)} on "
                "its root set. The server's model has diverged; lower the learning rate or the noise."
            )
        return found

    def _directions(self, params: Params, generator: torch.Generator) -> list[Params]:
        if self.settings.directions == "ones":
            return [{k: torch.ones_like(p) for k, p in params.items()}]

        def signs(p: Tensor) -> Tensor:
            return torch.randint(2, p.shape, generator=generator).to(p) * 2 - 1

        return [{k: signs(p) for k, p in params.items()} for _ in range(self.settings.num_directions)]


def sensitivity(victim: Victim, params: Params, buffers: Buffers, root: Batch, directions: list[Params]) -> Tensor:
    """[tensors] float64: the mean over the root set of the root mean square over the directions v of
    ||d (v^T gradient of tensor l) / d image||_2; images in [0, 1].

    Where BatchNorm couples the examples, the gradient is that of the root set's summed loss.
    """
    # reverse over reverse, tensor by tensor: each pass walks only through what its tensor's gradient depends on
    with torch.enable_grad():
        weights = {k: p.detach().requires_grad_() for k, p in params.items()}
        images = root.inputs.detach().to(next(iter(weights.values())).dtype).requires_grad_()
        batch = Batch(images, root.labels, root.mask.to(images.dtype))
        loss = victim.objective(weights, buffers, batch)[0] * len(images)
        gradients = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
        squares = [
            [_by_image((g * v[k]).sum(), images) for v in directions] for k, g in zip(weights, gradients, strict=True)
        ]
    return torch.stack([torch.stack(each).mean(0).sqrt().mean() for each in squares])


def _by_image(value: Tensor, images: Tensor) -> Tensor:
    """||d value / d image||^2 of every image [k] float64."""
    if value.grad_fn is None:
        return images.new_zeros(len(images), dtype=torch.float64)
    (slope,) = torch.autograd.grad(value, images, retain_graph=True, allow_unused=True, materialize_grads=True)
    return slope.flatten(1).double().square().sum(1)
