"""GradDefense: noise on a few slices of the update, taken out again on the server."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor
from torch.func import grad, vmap

from gia_bench.defenses.base import AskClient, BatchLoss, Client, Defense
from gia_bench.defenses.checks import check
from gia_bench.defenses.compensation import RandomMatrix
from gia_bench.defenses.draws import normal
from gia_bench.defenses.selection import exact, restricted
from gia_bench.defenses.sensitivity import Risk, Sensitivity
from gia_bench.defenses.slices import atom_size, energies, equal_risk, reservoir, spread
from gia_bench.errors import IncompatibleError
from gia_bench.values import Batch, Buffers, Examples, Noise, Observation, Params, Shared, State, Update

if TYPE_CHECKING:
    from gia_bench.models.functional import Victim

NORMAL = "normal."


@final
@dataclass(frozen=True, kw_only=True)
class GradDefense(Defense):
    """Adds N(0, variance) to d of s slices of equal leakage risk; the server compensates the mean (Wang et al. 2022).

    variance: of the noise, in the update's units squared, >= 0; gamma: share of the slices that get it, d = max(1,
    floor(s gamma)), in [0, 1]: 0.2 for LeNet, 0.3 for ConvNet; slices: s (gia_bench choice: the paper's is not known);
    risk: of every tensor, ``Sensitivity`` or its control ``LayerSize``; compensation: of the server, or None.

    clip: B, against those who compensate to attack: in every local step each example's gradient is shortened to a norm
    of at most B in every chosen slice, and the noise is N(0, variance B^2); None: no clipping. The released code has
    B = 0.1 and variance 1. Over local steps the clipping holds for each step's gradient, the noise comes once, on what
    is sent (gia_bench choice).

    Announced each round: ``borders`` [s + 1] int64, ``risk`` [tensors] float64, ``num_clients`` int64. Every client
    draws its slices itself. The compensation takes all clients of the cohort as equally weighted.

    Raises ``IncompatibleError`` for a model with fewer atoms than slices, and with ``clip`` for one whose examples are
    coupled (BatchNorm in training mode).
    """

    variance: float = 1e-2
    gamma: float = 0.2
    slices: int = 10
    risk: Risk = field(default_factory=Sensitivity)
    clip: float | None = None
    compensation: RandomMatrix | None = field(default_factory=RandomMatrix)

    def __post_init__(self) -> None:
        where = "defense graddefense: "
        check(where + "variance", self.variance, lambda v: 0 <= v < math.inf, "be finite and at least 0")
        check(where + "gamma", self.gamma, lambda g: 0 <= g <= 1, "lie in [0, 1]; it is a share, 0.2 means 20 %")
        check(where + "slices", self.slices, lambda s: s >= 1 and s == int(s), "be a whole number of at least 1")
        if self.clip is not None:
            check(where + "clip", self.clip, lambda b: 0 < b < math.inf, "be finite and above 0, or null")

    @property
    def num_chosen(self) -> int:
        """d, the slices that get noise."""
        return max(1, math.floor(self.slices * exact(self.gamma)))

    @property
    def sigma(self) -> float:
        """The noise's standard deviation in a chosen slice."""
        return math.sqrt(self.variance) * (1.0 if self.clip is None else self.clip)

    def check_victim(self, victim: Victim) -> None:
        """Needs an atom for every slice, and single examples where it clips."""
        sizes = [p.numel() for p in victim.initial()[0].values()]
        num_atoms = sum(sizes) // atom_size(sizes)
        if num_atoms < self.slices:
            raise IncompatibleError(
                f"defense graddefense cannot cut this model into {self.slices} slices: its tensors' sizes have the "
                f"common divisor {atom_size(sizes)}, which leaves {num_atoms} atoms; lower defense.slices."
            )
        if self.clip is not None and victim.batch_coupled:
            raise IncompatibleError(
                "defense graddefense with clip needs gradients of single examples, but BatchNorm in training mode "
                "mixes the examples of a batch; choose a model without it, or set model.training=false, or "
                "defense.clip=null."
            )

    def calibrate(self, victim: Victim, public: Examples) -> Defense:
        """With the root set of its risk."""
        return replace(self, risk=self.risk.calibrate(victim, public))

    def init_server(self, like: Params) -> State:
        """``risk``, not measured yet."""
        return {"risk": torch.zeros(len(like), dtype=torch.float64, device=_device(like))}

    def announce(
        self,
        like: Params,
        server_state: State,
        round_index: int,
        num_clients: int,
        draw: torch.Generator,
        ask: AskClient,
    ) -> Shared:
        """The slices of this round's parameters, and what the compensation must know."""
        due = self.risk.due(round_index)
        risk = self.risk.measure(like, round_index, draw) if due else server_state["risk"]
        borders = equal_risk([p.numel() for p in like.values()], risk, self.slices).to(risk.device)
        return {"borders": borders, "risk": risk}

    @property
    def own_gradients(self) -> bool:
        """With ``clip``."""
        return self.clip is not None

    def informed(self, shared: Shared) -> Defense:
        """With ``clip``, the local gradients on the announced slices."""
        return self if self.clip is None else _ClippedSlices(self.clip, shared["borders"])

    def draw(self, like: Params, batch: Batch, generator: torch.Generator) -> Noise:
        """``chosen`` [s] bool and ``normal.<parameter>``: standard normal numbers, float32 on the CPU."""
        chosen = reservoir(self.slices, self.num_chosen, generator)
        own = {NORMAL + name: n for name, n in normal(like, generator).items()}
        return {"chosen": chosen, **own}

    def protect(
        self, update: Update, client: Client, state: State, shared: Shared, noise: Noise
    ) -> tuple[Update, State]:
        """The update with noise on the chosen slices, and the same bits elsewhere."""
        noisy = spread(noise["chosen"], shared["borders"], client.params)
        sent = {
            name: torch.where(noisy[name], u + self.sigma * noise[NORMAL + name].to(u.device, u.dtype), u)
            for name, u in update.items()
        }
        return sent, state

    def compensate(
        self, aggregate: Update, server_state: State, shared: Shared, shares: Sequence[float]
    ) -> tuple[Update, State]:
        """The mean without what looks like noise; the risk is remembered for rounds that do not measure it."""
        return self._denoised(aggregate, shares), {"risk": shared["risk"]}

    @property
    def adds_noise(self) -> bool:
        """Unless variance is 0; on a part of the entries, so that it has no law here."""
        return self.variance > 0

    def surrogate(self, update: Update, observation: Observation) -> Update:
        """The dummy update without the d loudest slices of the observed one, where the noise must be. Zeros there add a
        constant to a Euclidean distance and a factor to a cosine. gia_bench choice; the paper's attacker compensates.
        """
        if "borders" not in observation.shared or self.num_chosen == self.slices:
            return update
        borders, like = observation.shared["borders"], observation.params
        loudness = energies(observation.update, borders, like) / borders.diff()
        loudest = loudness.topk(self.num_chosen).indices
        quiet = torch.ones_like(loudness).scatter(0, loudest, 0.0) > 0
        return restricted(update, spread(quiet, borders, like))

    def restore(self, update: Update, observation: Observation) -> Update:
        """The server's compensation of the clients behind the update: of one (m = 1), or of a cohort."""
        m = observation.num_clients  # whose weights an attacker does not see
        return self._denoised({name: update[name] for name in observation.params}, [1 / m] * m)

    def _denoised(self, update: Update, shares: Sequence[float]) -> Update:
        if self.compensation is None:
            return update
        # an entry of one client's update is noisy with probability d / s
        return self.compensation.denoise(update, self.num_chosen / self.slices * self.sigma**2, shares)


@final
@dataclass(frozen=True, eq=False)
class _ClippedSlices(Defense):
    """What ``clip`` does to local gradients, once the slices are known. bound: B; borders: [s + 1]."""

    bound: float
    borders: Tensor

    def gradient(
        self, loss: BatchLoss, params: Params, batch: Batch, noise: Noise, step: int
    ) -> tuple[Update, Buffers, Tensor]:
        """The mean of the examples' gradients, each with a norm of at most B in every chosen slice."""

        def of_one(example: Batch) -> tuple[Update, Buffers, Tensor]:
            def value(weights: Params) -> tuple[Tensor, tuple[Buffers, Tensor]]:
                mean, after = loss(weights, Batch(*(t[None] for t in example)))
                return mean, (after, mean)

            single, (after, mean) = grad(value, has_aux=True)(params)
            return self._clipped(single, params, noise["chosen"]), after, mean

        each, after, losses = vmap(of_one)(batch)
        count = batch.mask.sum().clamp(min=1)
        buffers = {k: b[0] for k, b in after.items()}  # untouched by independent examples
        return {k: g.sum(0) / count for k, g in each.items()}, buffers, losses.sum() / count

    def _clipped(self, single: Update, like: Params, chosen: Tensor) -> Update:
        norms = energies(single, self.borders, like).sqrt()
        factors = spread(torch.where(chosen, 1 / (norms / self.bound).clamp(min=1), 1.0), self.borders, like)
        return {name: g * factors[name].to(g.dtype) for name, g in single.items()}

    def protect(
        self, update: Update, client: Client, state: State, shared: Shared, noise: Noise
    ) -> tuple[Update, State]:
        """The update itself: the noise is ``GradDefense``'s."""
        return update, state


def _device(params: Params) -> torch.device:
    return next(iter(params.values())).device
