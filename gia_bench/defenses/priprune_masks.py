"""Which of its changes a client of PriPrune withholds: a fixed share of the most sensitive, or shares it learns."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import NamedTuple, final

import torch
from torch import Tensor

from gia_bench.defenses.checks import check
from gia_bench.defenses.selection import Mask, check_scope, exact
from gia_bench.errors import ConfigError
from gia_bench.rows import cut, joined
from gia_bench.values import Noise, Params, State, Update
from gia_bench.wire import bits_of

LOGITS, GUMBEL = "logits", "gumbel"
LIMIT = 5.0
"""Of a logit's magnitude, so that no choice is for ever; Gumbel noise has a deviation of 1.3 (gia_bench choice)."""


class Choice(NamedTuple):
    """What a client chooses its mask from. sensitivity: by parameter name, in the parameters' order, 0 where there is
    nothing to withhold; loss: the client's loss (scalar) after the server would have applied its change, of which
    every entry is sent to a share in [0, 1], by parameter name.
    """

    sensitivity: Update
    loss: Callable[[Update], Tensor]


class DefenseMask(ABC):
    """Hyperparameters are fields of a frozen dataclass; runs on a client, under ``vmap``."""

    def initial(self, like: Params) -> State:
        """What is remembered before a client's first round."""
        return {}

    def draw(self, like: Params, generator: torch.Generator) -> Noise:
        """The random numbers of one round."""
        return {}

    @abstractmethod
    def withheld(self, choice: Choice, state: State, noise: Noise) -> tuple[Mask, State]:
        """True where the change stays with the client; and what is remembered next."""


@final
@dataclass(frozen=True, kw_only=True)
class FixedRate(DefenseMask):
    """The floor(rate c) most sensitive of the c entries that are not zero.

    rate: in [0, 1); scope: "global" (all tensors together) or "tensor". Source: the only public implementation of
    PriPrune, in ERIS (arXiv 2602.08617), a third party's: global, rate 0.3, swept from 0.01 to 0.5. It takes a
    percentile of all entries; what was pruned before does not count here (gia_bench choice), or a model of density 0.2
    would send nothing at a rate of 0.3.
    """

    rate: float = 0.3
    scope: str = "global"

    def __post_init__(self) -> None:
        check(
            "defense priprune: mask.rate", self.rate, lambda r: 0 <= r < 1,
            "lie in [0, 1); it is a share, 0.3 means 30 %",
        )  # fmt: skip
        check_scope("priprune", self.scope)

    def withheld(self, choice: Choice, state: State, noise: Noise) -> tuple[Mask, State]:
        """By rank alone; nothing is remembered."""
        scores = choice.sensitivity
        if self.scope == "global":
            return cut(most_sensitive(joined(scores), [self.rate])[0], scores), {}
        return {k: most_sensitive(s.reshape(-1), [self.rate])[0].view(s.shape) for k, s in scores.items()}, {}


@final
@dataclass(frozen=True, kw_only=True)
class LearnedRates(DefenseMask):
    """Each tensor's rate is one of ``rates``, learned by each client in every round with the Gumbel-Softmax trick.

    Logits alpha [tensors, rates] stand for the choice and stay with the client. In each of ``steps`` steps,
    y = softmax((alpha + Gumbel noise) / temperature), an entry is sent to the share sum_r y_r 1[entry not among the
    floor(r c) most sensitive of its tensor's c entries that are not zero], and alpha goes ``learning_rate`` against the
    sign of the gradient of

        lambda_acc * loss of the model after what is sent
        + lambda_pri * share of the sensitivity that is sent, mean over tensors
        + lambda_sha * squared difference between the expected rates of neighbouring tensors, mean

    The temperature falls geometrically from ``temperature`` to ``final_temperature`` within a round. In the end each
    tensor gets the rate of its largest logit; the first of equal ones.

    Of all this PriPrune's authors published the words Gumbel-Softmax, accuracy, privacy and sharing loss, and the names
    of the lambdas: every form and value here is a gia_bench choice. Signs, since the scales of the three losses differ
    from model to model; and they are the same in a loop and under ``vmap``.
    """

    rates: Sequence[float] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
    steps: int = 5
    learning_rate: float = 0.25
    temperature: float = 5.0
    final_temperature: float = 0.5
    lambda_acc: float = 1.0
    lambda_pri: float = 0.01
    lambda_sha: float = 0.01

    def __post_init__(self) -> None:
        where, ascending = "defense priprune: mask.", list(self.rates)
        for rate in ascending:
            check(where + "rates", rate, lambda r: 0 <= r < 1, "hold shares in [0, 1); 0.3 means 30 %")
        if not ascending or ascending != sorted(set(ascending)):
            raise ConfigError(f"{where}rates={ascending} must be in ascending order, each once, and at least one.")
        check(where + "steps", self.steps, lambda n: n >= 1 and n == int(n), "be a whole number of at least 1")
        for name in ("learning_rate", "temperature", "final_temperature"):
            check(where + name, getattr(self, name), lambda v: 0 < v < math.inf, "be finite and above 0")
        for name in ("lambda_acc", "lambda_pri", "lambda_sha"):
            check(where + name, getattr(self, name), lambda v: 0 <= v < math.inf, "be finite and at least 0")

    def initial(self, like: Params) -> State:
        """No preference."""
        return {LOGITS: torch.zeros(len(like), len(self.rates))}

    def draw(self, like: Params, generator: torch.Generator) -> Noise:
        """Gumbel noise [steps, tensors, rates]."""
        uniform = torch.rand(self.steps, len(like), len(self.rates), generator=generator)
        return {GUMBEL: -(-uniform.clamp(min=torch.finfo(uniform.dtype).tiny).log()).clamp(min=1e-7).log()}

    def withheld(self, choice: Choice, state: State, noise: Noise) -> tuple[Mask, State]:
        """By the rates learned; the logits are remembered."""
        options = {k: _options(s, self.rates) for k, s in choice.sensitivity.items()}
        told = torch.stack([_sent_shares(s, options[k]) for k, s in choice.sensitivity.items()])
        rates = torch.tensor(list(self.rates), device=told.device, dtype=told.dtype)

        def objective(logits: Tensor, gumbel: Tensor, temperature: float) -> Tensor:
            y = ((logits + gumbel) / temperature).softmax(-1)
            sent = {
                k: 1 - sum(p * m for p, m in zip(row, options[k], strict=True))
                for k, row in zip(options, y, strict=True)
            }
            expected = y @ rates
            private, shared = (y * told).sum(-1).mean(), expected.diff().square().sum() / max(len(options) - 1, 1)
            return self.lambda_acc * choice.loss(sent) + self.lambda_pri * private + self.lambda_sha * shared

        logits, slope = state[LOGITS], torch.func.grad(objective)
        for step in range(self.steps):
            gradient = slope(logits, noise[GUMBEL][step].to(logits), self._temperature(step))
            # the sign of NaN is 0: a client who has lost his loss would send everything and say nothing
            sign = torch.where(gradient.isnan(), gradient, gradient.sign())
            logits = (logits - self.learning_rate * sign).clamp(-LIMIT, LIMIT)
        best = logits.argmax(-1)
        masks = {k: reduce(or_, [m & (best[i] == r) for r, m in enumerate(options[k])]) for i, k in enumerate(options)}
        return masks, {LOGITS: logits}

    def _temperature(self, step: int) -> float:
        done = step / max(self.steps - 1, 1)
        return float(self.temperature ** (1 - done) * self.final_temperature**done)


def most_sensitive(entries: Tensor, rates: Sequence[float]) -> list[Tensor]:
    """For each rate, True for the floor(rate c) largest magnitudes of ``entries`` [n], c of which are not zero.

    Of equal ones the first; NaN is the largest. How many entries are not zero may depend on the client, so that the
    number chosen is a tensor, which neither ``topk`` nor ``kthvalue`` takes: the last chosen is found bit by bit, in as
    many looks at all entries as a number has bits.
    """
    shares = [exact(rate) for rate in rates]
    magnitudes = bits_of(entries.abs())  # these order like the floats, and unlike them order NaN
    present = magnitudes.count_nonzero()
    counts = [torch.div(present * s.numerator, s.denominator, rounding_mode="floor") for s in shares]
    return [_largest(magnitudes, count) for count in counts]


def _largest(magnitudes: Tensor, count: Tensor) -> Tensor:
    smallest = torch.zeros_like(count, dtype=magnitudes.dtype)
    for bit in reversed(range(8 * magnitudes.element_size() - 1)):
        larger = smallest | (1 << bit)
        smallest = torch.where((magnitudes >= larger).count_nonzero() >= count, larger, smallest)
    above, equal = magnitudes > smallest, magnitudes == smallest
    room = count - above.count_nonzero()
    return (above | (equal & (equal.cumsum(0, dtype=torch.int32) <= room))) & (count > 0)


def _options(sensitivity: Tensor, rates: Sequence[float]) -> list[Tensor]:
    """What each rate withholds of one tensor."""
    return [mask.view(sensitivity.shape) for mask in most_sensitive(sensitivity.reshape(-1), rates)]


def _sent_shares(sensitivity: Tensor, options: list[Tensor]) -> Tensor:
    """The share of one tensor's sensitivity that each rate lets pass, [rates]."""
    whole = sensitivity.sum()
    passed = torch.stack([torch.where(mask, 0, sensitivity).sum() for mask in options])
    return torch.where(whole > 0, passed / torch.where(whole > 0, whole, 1), 0)
