"""Pruning by percentile, by chance and by value: the controls of Top-k and DGP."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from gia_bench.defenses.base import Client, Defense
from gia_bench.defenses.checks import check
from gia_bench.defenses.feedback import ErrorFeedback
from gia_bench.defenses.selection import Mask, exact, on_support
from gia_bench.values import Batch, Noise, Observation, Params, Shared, State, Update
from gia_bench.wire import SPARSE, Codec, bits_of

FORGETS = ErrorFeedback(enabled=False)


@final
@dataclass(frozen=True, kw_only=True)
class GradientCompression(Defense):
    """GC: entries below the ``prune`` percentile of their tensor's magnitudes are zeroed, everything else is sent.

    prune: share in [0, 1). The percentile is numpy's (linear interpolation), as in the code of Soteria, GGL,
    GradDefense and Plato: of n distinct magnitudes the ceil(prune (n - 1)) smallest go; equal ones go or stay together,
    which is where it differs from ``TopK``. The papers use it without error feedback.
    """

    prune: float = 0.8
    error_feedback: ErrorFeedback = FORGETS

    def __post_init__(self) -> None:
        check(
            "defense gradient_compression: prune", self.prune, lambda s: 0 <= s < 1,
            "lie in [0, 1); it is a share, 0.8 means 80 %",
        )  # fmt: skip

    @property
    def codec(self) -> Codec:
        """Values and their positions."""
        return SPARSE

    def init_client(self, like: Params) -> State:
        """An empty residual."""
        return self.error_feedback.initial(like)

    def select(self, update: Update) -> Mask:
        """True where an entry is sent."""
        return {name: self._above(u) for name, u in update.items()}

    def protect(
        self, update: Update, client: Client, state: State, shared: Shared, noise: Noise
    ) -> tuple[Update, State]:
        """The entries at or above the percentile."""
        return self.error_feedback.send(update, state, self.select)

    def surrogate(self, update: Update, observation: Observation) -> Update:
        """The dummy update where the observed one is not zero."""
        return on_support(update, observation.update)

    @property
    def repays(self) -> bool:
        """As its error feedback does."""
        return self.error_feedback.repays

    def measure(self, state: State) -> dict[str, Tensor]:
        """``residual_norm`` and ``never_sent_share``."""
        return self.error_feedback.measure(state)

    def _above(self, u: Tensor) -> Tensor:
        n = u.numel()
        if n == 0:
            return torch.zeros_like(u, dtype=torch.bool)
        # between two neighbours the percentile prunes the lower one, so it is their upper one that decides
        kept = n - math.ceil(exact(self.prune) * (n - 1))
        magnitudes = bits_of(u.abs())  # these order like the floats, and unlike them order NaN
        return magnitudes >= magnitudes.reshape(-1).topk(kept, sorted=False).values.amin()


@final
@dataclass(frozen=True, kw_only=True)
class RandomK(Defense):
    """A random share of every tensor's entries, newly drawn by each client in each round (Stich et al. 2018).

    keep: share in (0, 1]; ceil(keep n) of n entries are sent, at least one of every tensor, as many as by ``TopK``.
    """

    keep: float = 0.2
    error_feedback: ErrorFeedback = field(default_factory=ErrorFeedback)

    def __post_init__(self) -> None:
        check("defense random_k: keep", self.keep, lambda s: 0 < s <= 1, "lie in (0, 1]; it is a share, 0.2 means 20 %")

    @property
    def codec(self) -> Codec:
        """Values and their positions."""
        return SPARSE

    def init_client(self, like: Params) -> State:
        """An empty residual."""
        return self.error_feedback.initial(like)

    def draw(self, like: Params, batch: Batch, generator: torch.Generator) -> Noise:
        """Which entries are sent: bool, by parameter name."""

        def chosen(param: Tensor) -> Tensor:
            n = param.numel()
            mask = torch.zeros(n, dtype=torch.bool)
            mask[torch.randperm(n, generator=generator)[: math.ceil(exact(self.keep) * n)]] = True
            return mask.view(param.shape)

        return {name: chosen(param) for name, param in like.items()}

    def protect(
        self, update: Update, client: Client, state: State, shared: Shared, noise: Noise
    ) -> tuple[Update, State]:
        """The drawn entries of the update with its residual."""
        return self.error_feedback.send(update, state, lambda full: {name: noise[name] for name in full})

    def surrogate(self, update: Update, observation: Observation) -> Update:
        """The dummy update where the observed one is not zero."""
        return on_support(update, observation.update)

    @property
    def repays(self) -> bool:
        """As its error feedback does."""
        return self.error_feedback.repays

    def measure(self, state: State) -> dict[str, Tensor]:
        """``residual_norm`` and ``never_sent_share``."""
        return self.error_feedback.measure(state)


@final
@dataclass(frozen=True, kw_only=True)
class Threshold(Defense):
    """Entries whose magnitude is at least ``value``, in the update's units (Strom 2015, without its quantization)."""

    value: float = 1e-3
    error_feedback: ErrorFeedback = field(default_factory=ErrorFeedback)

    def __post_init__(self) -> None:
        check("defense threshold: value", self.value, lambda v: 0 <= v < math.inf, "be finite and at least 0")

    @property
    def codec(self) -> Codec:
        """Values and their positions."""
        return SPARSE

    def init_client(self, like: Params) -> State:
        """An empty residual."""
        return self.error_feedback.initial(like)

    def select(self, update: Update) -> Mask:
        """True where an entry is sent."""
        return {name: u.abs() >= self.value for name, u in update.items()}

    def protect(
        self, update: Update, client: Client, state: State, shared: Shared, noise: Noise
    ) -> tuple[Update, State]:
        """The large entries of the update with its residual."""
        return self.error_feedback.send(update, state, self.select)

    def surrogate(self, update: Update, observation: Observation) -> Update:
        """The dummy update where the observed one is not zero."""
        return on_support(update, observation.update)

    @property
    def repays(self) -> bool:
        """As its error feedback does."""
        return self.error_feedback.repays

    def measure(self, state: State) -> dict[str, Tensor]:
        """``residual_norm`` and ``never_sent_share``."""
        return self.error_feedback.measure(state)
