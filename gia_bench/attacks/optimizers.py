"""What an optimiser of many candidates at once is, and Adam and SGD.

Candidates have two axes, V victims and T restarts, and never see each other: whatever an optimiser computes for one is
what it would compute for that one alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, TypeAlias, final

import torch
from torch import Tensor

from gia_bench.attacks.checks import check
from gia_bench.values import State

Variables: TypeAlias = dict[str, Tensor]
"""What an attack optimises, by name, each [V, T, ...]: ``pixels``, and ``labels`` where they are optimised too."""


class Evaluate(Protocol):
    """The function that is minimised, of all candidates at once."""

    def __call__(self, variables: Variables, wanted: Tensor | None = None) -> tuple[Tensor, Variables]:
        """The losses [V, T] and their gradients. ``wanted`` [V, T] bool (None: all) are the candidates whose values are
        used; the others may get infinity and zeros, which saves their work where that can be known without waiting.
        """
        ...


class Moment(NamedTuple):
    """Where an attack stands: step (from 0) of steps, and the factor on the learning rate: the schedule's, or one for
    every candidate, [V, T].
    """

    step: int
    steps: int
    rate: float | Tensor

    def paced(self, way: Tensor) -> Tensor:
        """``way`` [V, T, ...] times the factor."""
        if isinstance(self.rate, Tensor):
            return way * self.rate.view(*self.rate.shape, *[1] * (way.ndim - 2))
        return way if self.rate == 1 else way * self.rate


class Move(NamedTuple):
    """One step's result. loss: [V, T], of the variables *before* the step; settled: [V, T] bool, candidates that no
    further step can change.
    """

    loss: Tensor
    variables: Variables
    state: State
    settled: Tensor


class Optimizer(ABC):
    """Hyperparameters are fields; the state is an argument and a return value, flat and by name."""

    @property
    @abstractmethod
    def lr(self) -> float:
        """The learning rate, before the schedule."""

    @abstractmethod
    def init(self, variables: Variables) -> State:
        """The state before the first step."""

    @abstractmethod
    def step(self, variables: Variables, state: State, evaluate: Evaluate, moment: Moment) -> Move:
        """One step of every candidate, without waiting for the device. ``state`` may be written into."""


Transform: TypeAlias = Callable[[Tensor, Moment], Tensor]
"""What an optimiser sees instead of a gradient."""


@final
@dataclass(frozen=True)
class Raw:
    """The gradient as it is."""

    def __call__(self, gradient: Tensor, moment: Moment) -> Tensor:
        return gradient


@final
@dataclass(frozen=True)
class Sign:
    """The sign of the gradient (Geiping et al. 2020; breaching's "hard")."""

    def __call__(self, gradient: Tensor, moment: Moment) -> Tensor:
        return gradient.sign()


@final
@dataclass(frozen=True)
class SoftSign:
    """tanh(s g) / s with s = 1 - step / steps (breaching's "soft"): near the sign at first, the gradient at last."""

    def __call__(self, gradient: Tensor, moment: Moment) -> Tensor:
        s = 1 - moment.step / moment.steps
        return (s * gradient).tanh() / s


@final
@dataclass(frozen=True, kw_only=True)
class Adam(Optimizer):
    """Adam (Kingma and Ba 2015), equal to ``torch.optim.Adam`` candidate by candidate.

    lr: in the units of the variables (normalised pixels); transform: applied to the gradient first.
    """

    lr: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    transform: Transform = field(default_factory=Raw)

    def __post_init__(self) -> None:
        check(self.lr > 0, "adam.lr", self.lr, "a number above 0")
        check(0 <= self.beta1 < 1, "adam.beta1", self.beta1, "a number in [0, 1)")
        check(0 <= self.beta2 < 1, "adam.beta2", self.beta2, "a number in [0, 1)")
        check(self.eps > 0, "adam.eps", self.eps, "a number above 0")

    def init(self, variables: Variables) -> State:
        return {f"{moment}.{k}": torch.zeros_like(v) for k, v in variables.items() for moment in ("mean", "square")}

    def step(self, variables: Variables, state: State, evaluate: Evaluate, moment: Moment) -> Move:
        loss, gradients = evaluate(variables)
        new_state: State = {}
        moved: Variables = {}
        unbias1, unbias2 = 1 - self.beta1 ** (moment.step + 1), 1 - self.beta2 ** (moment.step + 1)
        for k, gradient in gradients.items():
            g = self.transform(gradient, moment)
            mean = state[f"mean.{k}"].lerp(g, 1 - self.beta1)
            square = (state[f"square.{k}"] * self.beta2).addcmul_(g, g, value=1 - self.beta2)
            scale = (square.sqrt() / unbias2**0.5).add_(self.eps)
            moved[k] = variables[k].addcdiv(moment.paced(mean), scale, value=-self.lr / unbias1)
            new_state |= {f"mean.{k}": mean, f"square.{k}": square}
        return Move(loss, moved, new_state, torch.zeros_like(loss, dtype=torch.bool))


@final
@dataclass(frozen=True, kw_only=True)
class SGD(Optimizer):
    """Gradient descent with momentum, equal to ``torch.optim.SGD`` candidate by candidate.

    lr: in the units of the variables (normalised pixels) per unit of the gradient; momentum: 0 for none; nesterov: look
    ahead (Nesterov's form, needs momentum); transform: applied to the gradient first.
    """

    lr: float = 0.1
    momentum: float = 0.0
    nesterov: bool = False
    transform: Transform = field(default_factory=Raw)

    def __post_init__(self) -> None:
        check(self.lr > 0, "sgd.lr", self.lr, "a number above 0")
        check(0 <= self.momentum < 1, "sgd.momentum", self.momentum, "a number in [0, 1)")
        check(not self.nesterov or self.momentum > 0, "sgd.nesterov", self.nesterov, "false where sgd.momentum is 0")

    def init(self, variables: Variables) -> State:
        return {f"velocity.{k}": torch.zeros_like(v) for k, v in variables.items()}

    def step(self, variables: Variables, state: State, evaluate: Evaluate, moment: Moment) -> Move:
        loss, gradients = evaluate(variables)
        new_state: State = {}
        moved: Variables = {}
        for k, gradient in gradients.items():
            g = self.transform(gradient, moment)
            velocity = state[f"velocity.{k}"] * self.momentum + g
            way = g + self.momentum * velocity if self.nesterov else velocity
            moved[k] = variables[k] - self.lr * moment.paced(way)
            new_state[f"velocity.{k}"] = velocity
        return Move(loss, moved, new_state, torch.zeros_like(loss, dtype=torch.bool))
