"""DP-SGD: every example's gradient is clipped, and noise is added to their sum at every local step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor
from torch.func import grad, vmap

from gia_bench.defenses.base import BatchLoss, Client, Defense, NoiseLaw
from gia_bench.defenses.checks import check
from gia_bench.defenses.clip import clipped
from gia_bench.defenses.dp_accounting import Mechanism, check_budget
from gia_bench.defenses.draws import normal
from gia_bench.defenses.noise import Gaussian
from gia_bench.errors import IncompatibleError
from gia_bench.values import Batch, Buffers, Noise, Observation, Params, Shared, State, Update

if TYPE_CHECKING:
    from gia_bench.models.functional import Victim


@final
@dataclass(frozen=True, kw_only=True)
class DPSGD(Defense):
    """(sum of per-example gradients, each clipped, + noise) / examples (Abadi et al. 2016, algorithm 1).

    max_grad_norm: C, the joint Euclidean norm that one example's gradient may have, > 0; noise_multiplier: the noise's
    standard deviation is noise_multiplier * C on the sum, >= 0. delta, accountant: of the budget that is recorded, as
    in ``dp_accounting.epsilon``.

    What the noised sum is divided by must be public. Of a shuffled batch that is its size; of a Poisson batch the local
    work takes the expected size instead (``federated.sampling``), and an empty batch sends its noise as any other. Only
    with Poisson batches is the recorded budget that of the run, else it is nominal.

    A model whose examples are coupled (BatchNorm in training mode) is refused.
    """

    max_grad_norm: float = 1.0
    noise_multiplier: float = 1.0
    delta: float = 1e-5
    accountant: str = "rdp"

    def __post_init__(self) -> None:
        check("defense dp_sgd: max_grad_norm", self.max_grad_norm, lambda c: 0 < c < math.inf, "be finite and above 0")
        check(
            "defense dp_sgd: noise_multiplier", self.noise_multiplier, lambda s: 0 <= s < math.inf,
            "be finite and at least 0",
        )  # fmt: skip
        check_budget("defense dp_sgd:", self.delta, self.accountant)

    @property
    def mechanism(self) -> Mechanism:
        """Of one local step, for one of the client's examples."""
        return Mechanism("example", self.noise_multiplier, self.delta, self.accountant)

    def check_victim(self, victim: Victim) -> None:
        """Needs a model whose examples are independent."""
        if victim.batch_coupled:
            raise IncompatibleError(
                "defense dp_sgd needs gradients of single examples, but BatchNorm in training mode mixes the examples "
                "of a batch; choose a model with GroupNorm or none, or set model.training=false."
            )

    def draw(self, like: Params, batch: Batch, generator: torch.Generator) -> Noise:
        """``<step>.<parameter>``: standard normal numbers for each local step, float32 on the CPU."""
        steps = range(batch.mask.shape[0])
        return {f"{s}.{k}": n for s in steps for k, n in normal(like, generator).items()}

    def gradient(
        self, loss: BatchLoss, params: Params, batch: Batch, noise: Noise, step: int
    ) -> tuple[Update, Buffers, Tensor]:
        """The clipped and noised mean gradient, that of an empty batch divided by 1; padding contributes nothing."""

        def of_one(example: Batch) -> tuple[Update, Buffers, Tensor]:
            def value(weights: Params) -> tuple[Tensor, tuple[Buffers, Tensor]]:
                mean, after = loss(weights, Batch(*(t[None] for t in example)))
                return mean, (after, mean)

            single, (after, mean) = grad(value, has_aux=True)(params)
            # a padded example's loss is 0 whatever its pixels, and so is its gradient
            return clipped(single, self.max_grad_norm), after, mean

        each, after, losses = vmap(of_one)(batch)
        sigma, count = self.noise_multiplier * self.max_grad_norm, batch.mask.sum().clamp(min=1)
        total = {k: g.sum(0) + sigma * noise[f"{step}.{k}"].to(g.device, g.dtype) for k, g in each.items()}
        buffers = {k: b[0] for k, b in after.items()}  # untouched by independent examples
        return {k: t / count for k, t in total.items()}, buffers, losses.sum() / count

    def protect(
        self, update: Update, client: Client, state: State, shared: Shared, noise: Noise
    ) -> tuple[Update, State]:
        """The update itself: its gradients are private already."""
        return update, state

    @property
    def adds_noise(self) -> bool:
        """Unless the multiplier is 0."""
        return self.noise_multiplier > 0

    def noise_law(self, observation: Observation | None = None) -> NoiseLaw | None:
        """Gaussian, of noise_multiplier * C / examples in the unit of an update of one local step; of K clients' mean,
        sqrt(K) times that, over the examples of all. None for several steps, where a step's noise also changes the
        gradients after it, and where the number of examples is not shown."""
        sigma = self.noise_multiplier * self.max_grad_norm
        if observation is None or not observation.num_examples or not sigma:
            return None
        local, count = observation.local, observation.num_examples
        if local is not None and sum(map(len, local.plan(observation.examples_each))) > 1:
            return None
        return Gaussian(observation.unit * sigma * math.sqrt(observation.num_clients) / count)

    def surrogate(self, update: Update, observation: Observation) -> Update:
        """The dummy gradient clipped at C: exact for one example. A mean of several clipped gradients is at most as
        long, so that this is the nearest one that clipping allows; how long it really is depends on the gradient of
        every example. Local steps (FedAvg) are left as they are: their weight decay is not clipped, and a walk with
        clipped steps leads to other weights than the dummy's.
        """
        if observation.local is not None and observation.local.learning_rate is not None:
            return update
        return clipped(update, observation.unit * self.max_grad_norm)
