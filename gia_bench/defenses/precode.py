"""PRECODE: a variational bottleneck before the last linear layer, whose noise enters every gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import torch
from torch import Generator, Tensor, nn

from gia_bench.defenses.base import BatchLoss, Client, Defense
from gia_bench.defenses.checks import check
from gia_bench.models.bottleneck import NOISE, BottleneckedHead, no_head, with_bottleneck
from gia_bench.seeding import stream
from gia_bench.values import Batch, Buffers, Noise, Params, Shared, State, Update

if TYPE_CHECKING:
    from gia_bench.models.functional import Victim

_MARK = "bottleneck.encoder.weight"


@final
@dataclass(frozen=True, kw_only=True)
class PRECODE(Defense):
    """The model gains a ``VariationalBottleneck``, the loss its penalty (Scheliga et al., WACV 2022).

    latent_size: K, the numbers that are sampled per example, >= 1; beta: weight of the KL divergence, >= 0. Every
    local step and every example has noise of its own. The client's buffer is at rest before and after the step.

    gia_bench choices: at evaluation z = mu (the paper's description makes no difference to training, where z is a
    sample), so that accuracy has no noise of its own. A gradient-matching attacker has the same model and the same
    loss, penalty included, with z = mu: he does not know the noise. One who searches for the noise too may do better.

    The new layers start as torch's linear layers do (as in the authors' code), whatever ``model.init`` says of the
    model's own. With the head they are three linear layers in a row: learning rates that a model bears can be too high
    with them (the authors train with Adam, 1e-3).

    Attackers may mute the new layers. ``Layers(layers="all_but_last")`` leaves the head out, ``"all_conv"`` also the
    bottleneck, of convolutional networks; the noise still reaches the layers before it by backpropagation. The first
    layer of a fully connected network gives a single image away whatever the noise (attack ``analytic``).

    Labels can still be read off the head's bias. Its inputs are signed now, so rules for inputs that are not negative
    (``idlg``, ``llg``) can be wrong.

    Raises ``IncompatibleError`` for a model that does not end in a linear layer.
    """

    latent_size: int = 256
    beta: float = 1e-3

    def __post_init__(self) -> None:
        whole = "be a whole number of at least 1"
        check("defense precode: latent_size", self.latent_size, lambda k: k >= 1 and k % 1 == 0, whole)
        check("defense precode: beta", self.beta, lambda b: 0 <= b < math.inf, "be finite and at least 0")

    def prepare_model(self, model: nn.Module) -> nn.Module:
        """A copy with the bottleneck, whose layers start as torch's linear layers do."""
        return with_bottleneck(model, latent_size=int(self.latent_size), beta=self.beta)

    def check_victim(self, victim: Victim) -> None:
        """The bottleneck must lie before the layer that gives the scores."""
        places = [name for name, m in victim.module.named_modules() if isinstance(m, BottleneckedHead)]
        head = victim.head
        if head is None or not places or head.weight != f"{places[-1]}.head.weight".lstrip("."):
            raise no_head()

    def draw(self, like: Params, batch: Batch, generator: torch.Generator) -> Noise:
        """``<step>.noise``: standard normal numbers [B, K] for each local step, float32 on the CPU."""
        S, B = batch.mask.shape[:2]
        seed, K = generator.initial_seed(), int(self.latent_size)

        def rows(step: Generator) -> Tensor:
            # one row after another: as one draw, an example's numbers would depend on the padding behind it
            return torch.stack([torch.randn(K, generator=step) for _ in range(B)])

        return {f"{s}.{NOISE}": rows(stream(seed, "step", s)) for s in range(S)}

    def gradient(
        self, loss: BatchLoss, params: Params, batch: Batch, noise: Noise, step: int
    ) -> tuple[Update, Buffers, Tensor]:
        """The gradient of the loss at this step's sample."""
        encoder = next(k for k in params if k.endswith(_MARK))
        # padding is cut off the end of a batch, so its noise is too
        own = noise[f"{step}.{NOISE}"][: batch.mask.shape[0]].to(params[encoder])
        sample = {encoder.removesuffix(_MARK) + f"bottleneck.{NOISE}": own}

        def sampled(params: Params, batch: Batch, replaced: Buffers | None = None) -> tuple[Tensor, Buffers]:
            return loss(params, batch, {**(replaced or {}), **sample})

        return super().gradient(sampled, params, batch, noise, step)

    def protect(
        self, update: Update, client: Client, state: State, shared: Shared, noise: Noise
    ) -> tuple[Update, State]:
        """The update itself: the noise is in it."""
        return update, state
