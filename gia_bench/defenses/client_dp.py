"""Client-level differential privacy: every client clips its update and adds Gaussian noise to it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch

from gia_bench.defenses.base import Client, Defense, NoiseLaw
from gia_bench.defenses.checks import check
from gia_bench.defenses.clip import clipped
from gia_bench.defenses.dp_accounting import Mechanism, check_budget
from gia_bench.defenses.draws import normal
from gia_bench.defenses.noise import Gaussian, averaged
from gia_bench.values import Batch, Noise, Observation, Params, Shared, State, Update


@final
@dataclass(frozen=True, kw_only=True)
class ClientDP(Defense):
    """update * min(1, max_norm / ||update||) + N(0, (noise_multiplier * max_norm)^2) (Geyer et al. 2017; McMahan et al.
    2018), with the noise on each client's own update, so that no server has to be trusted (gia_bench choice: there the
    server adds it to the sum).

    max_norm: the Euclidean norm that all tensors together may have, in the update's units, > 0; noise_multiplier: >= 0.
    The noise of K equally weighted clients is sqrt(K) times as strong in their sum. delta, accountant: of the budgets
    that are recorded, as in ``dp_accounting.epsilon``.
    """

    max_norm: float = 1.0
    noise_multiplier: float = 1.0
    delta: float = 1e-5
    accountant: str = "rdp"

    def __post_init__(self) -> None:
        check("defense client_dp: max_norm", self.max_norm, lambda c: 0 < c < math.inf, "be finite and above 0")
        check(
            "defense client_dp: noise_multiplier", self.noise_multiplier, lambda s: 0 <= s < math.inf,
            "be finite and at least 0",
        )  # fmt: skip
        check_budget("defense client_dp:", self.delta, self.accountant)

    @property
    def mechanism(self) -> Mechanism:
        """Of one update, for the client that sends it."""
        return Mechanism("client", self.noise_multiplier, self.delta, self.accountant)

    def draw(self, like: Params, batch: Batch, generator: torch.Generator) -> Noise:
        """Standard normal numbers, float32 on the CPU, by parameter name."""
        return normal(like, generator)

    def protect(
        self, update: Update, client: Client, state: State, shared: Shared, noise: Noise
    ) -> tuple[Update, State]:
        """The shortened update with its noise."""
        sigma = self.noise_multiplier * self.max_norm
        short = clipped(update, self.max_norm)
        return {name: u + sigma * noise[name].to(u.device, u.dtype) for name, u in short.items()}, state

    def noise_law(self, observation: Observation | None = None) -> NoiseLaw | None:
        """Gaussian, of noise_multiplier * max_norm, which is public; of K clients, over sqrt(K). None for no
        noise."""
        sigma = self.noise_multiplier * self.max_norm
        return Gaussian(sigma / math.sqrt(averaged(observation))) if sigma else None

    def surrogate(self, update: Update, observation: Observation) -> Update:
        """The clipping, which is differentiable; the noise has its law."""
        return clipped(update, self.max_norm)
