"""Closed-form inversion of a vision transformer's first attention (Lu et al., CVPR 2022, APRIL)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from gia_bench.attacks.analytic import METHODS_READ
from gia_bench.attacks.base import FORGET, Attack, Snapshots
from gia_bench.attacks.labels import METHODS
from gia_bench.attacks.scene import PixelSpace, update_unit
from gia_bench.attacks.unexplained import on_host, unexplained
from gia_bench.errors import ConfigError, IncompatibleError, choices
from gia_bench.models.functional import Victim
from gia_bench.models.vit import VisionTransformer
from gia_bench.threat import Knowledge
from gia_bench.values import Observation, Params, Reconstruction, Update

PROJECTIONS = tuple(f"encoders.0.0.{name}.weight" for name in ("q", "k", "v"))
NEEDED = ("position", *PROJECTIONS)


@final
@dataclass(frozen=True, kw_only=True)
class April(Attack):
    """The tokens z [N, dim] that enter the first attention solve A^T z = b, then each patch its embedding.

    A = dL/dz is the gradient of the positions, because z = patches + positions and one example is sent; b is the sum of
    W^T dL/dW over the queries', keys' and values' weights. Determined if A has rank N; singular values below the
    update's own precision are taken for zero, and the shortest solution then stands for what they would have said.
    labels: how labels are found (``labels.METHODS`` without ``joint``). The score is the share of the observed gradient
    that the image leaves unexplained; where A is nearly singular, wrong images explain it too. Takes
    ``model=vit_april``, with no more tokens and no more numbers in a patch than a token has. The paper's second attack,
    which searches, is ``april_optimized``.
    """

    labels: str = "auto"

    def __post_init__(self) -> None:
        if self.labels not in METHODS_READ:
            raise ConfigError(choices("attack.labels", self.labels, METHODS_READ))

    @property
    def requires(self) -> Knowledge:
        return Knowledge.NUM_EXAMPLES | (Knowledge.LABELS if self.labels == "known" else Knowledge.NONE)

    @property
    def max_examples(self) -> int | None:
        return 1

    @property
    def max_local_steps(self) -> int | None:
        return 1

    def check_victim(self, victim: Victim) -> None:
        """Needs tokens that go into the first attention as they are, and are wide enough."""
        _transformer(victim)

    def reconstruct_many(
        self,
        observations: Sequence[Observation],
        victim: Victim,
        *,
        seeds: Sequence[int],
        snapshots: Snapshots = FORGET,
    ) -> list[Reconstruction]:
        model = _transformer(victim)
        return [self._reconstruct(o, victim, model) for o in observations]

    def _reconstruct(self, observation: Observation, victim: Victim, model: VisionTransformer) -> Reconstruction:
        if observation.num_examples != 1:
            raise IncompatibleError(
                f"APRIL takes updates of one example, and this one holds {observation.num_examples}; "
                "train with one example per client and round."
            )
        absent = [name for name in NEEDED if name not in observation.update]
        if absent:
            raise IncompatibleError(f"APRIL needs {', '.join(absent)}, which this update does not show.")
        labels = METHODS[self.labels](observation, victim)
        assert labels is not None  # ``joint`` is not in METHODS_READ
        sent = observation.update["position"]
        like = torch.zeros(1, *victim.input_shape, dtype=torch.float64)
        unit, params = update_unit(observation), on_host(observation.params)
        gradient = {k: v / unit for k, v in on_host(observation.update).items()}
        failure = None
        if not all(g.isfinite().all() for g in gradient.values()):
            failure = "the observed update holds NaN or infinity"
        elif not gradient["position"].any():
            failure = "every entry of position in the observed update is zero"
        if failure is not None:
            return Reconstruction(inputs=like.to(sent), labels=labels, score=float("inf"), failure=failure)
        tokens = first_tokens(params, gradient, torch.finfo(sent.dtype).eps)
        pixels = model.assemble(_patches(params, tokens)[None], victim.input_shape[1:])
        inputs = PixelSpace.of(victim, like).decode(pixels)
        score = unexplained(observation, victim, gradient, inputs, labels.cpu())
        return Reconstruction(inputs=inputs.to(sent), labels=labels, score=score)


def first_tokens(params: Params, gradient: Update, precision: float) -> Tensor:
    """z [N, dim], the positions included, in float64. precision:
    singular values of A below it times the largest are 0."""
    b = torch.stack([params[name].T @ gradient[name] for name in PROJECTIONS]).sum(0)
    z: Tensor = torch.linalg.lstsq(gradient["position"].T, b, rcond=precision, driver="gelsd").solution
    return z


def _patches(params: Params, tokens: Tensor) -> Tensor:
    embedded = (tokens - params["position"])[1:] - params["patch.bias"]  # the class token comes first
    patches: Tensor = torch.linalg.lstsq(params["patch.weight"], embedded.T).solution.T
    return patches


def _transformer(victim: Victim) -> VisionTransformer:
    model = victim.module
    if not isinstance(model, VisionTransformer):
        raise IncompatibleError(
            "APRIL needs a transformer whose first attention gets the sum of patches and positions as it is, without a "
            f"norm before it or a skip connection around it, and this model is {type(model).__name__}; take "
            "model=vit_april."
        )
    (tokens, dim), numbers = model.position.shape, model.patch.in_features
    if dim < max(tokens, numbers):
        raise IncompatibleError(
            f"APRIL finds {tokens} tokens and {numbers} numbers per patch from {dim} equations each, which leaves them "
            f"open; raise model.network.dim to {max(tokens, numbers)} or more, or change model.network.patch_size."
        )
    return model
