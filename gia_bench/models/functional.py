"""A model as pure functions of (params, buffers), with the loss that client and attacker share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias, final

import torch
from torch import Tensor, nn
from torch.func import functional_call

from gia_bench.errors import ConfigError
from gia_bench.values import Batch, Buffers, Params

Loss: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""(logits [B, classes], labels [B] int64 or [B, classes] probabilities) -> [B], one value per example."""


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Softmax cross-entropy per example; labels are classes or probabilities."""
    if labels.ndim == logits.ndim:
        return nn.functional.cross_entropy(logits, labels, reduction="none")
    # what torch's own does, whose lookup takes ten times as long under vmap
    found: Tensor = logits.log_softmax(-1).gather(-1, labels[..., None])
    return -found.squeeze(-1)


def binary_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Sigmoid cross-entropy against one-hot labels, mean over the classes (PruneFL's loss), per example."""
    if labels.dtype == torch.int64:
        # compared, because torch's one_hot looks at the values, which vmap forbids
        labels = (labels[..., None] == torch.arange(logits.shape[-1], device=labels.device)).to(logits.dtype)
    return nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(-1)


class Penalised(NamedTuple):
    """What a module may return instead of scores [B, classes]: these, and what the loss gains per example [B]."""

    logits: Tensor
    penalty: Tensor


class Head(NamedTuple):
    """Names of the last linear layer's parameters, from which labels leak."""

    weight: str
    bias: str | None


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class Victim:
    """What everybody knows of the model that is trained: architecture, loss, shapes, normalisation.

    module: its structure is used, its tensors only as the first parameters; input_shape: (C, H, W);
    mean, std: per channel, applied to images in [0, 1] before the module (None: not normalised);
    training: whether clients compute gradients in training mode (BatchNorm uses batch statistics).
    Raises ``ConfigError`` for a module that draws random numbers while it trains (dropout): its noise would depend
    on how clients are batched.
    """

    module: nn.Module
    input_shape: tuple[int, int, int]
    num_classes: int
    loss: Loss = cross_entropy
    mean: Tensor | None = None
    std: Tensor | None = None
    training: bool = True

    def __post_init__(self) -> None:
        for name, part in self.module.named_modules():
            random = isinstance(part, nn.modules.dropout._DropoutNd) or type(part).__name__ == "StochasticDepth"
            if self.training and random and getattr(part, "p", 0.0) > 0:
                raise ConfigError(
                    f"The model's layer {name!r} ({type(part).__name__}, p={part.p}) draws random numbers while it "
                    "trains; set its p to 0, or train in evaluation mode."
                )

    @property
    def batch_coupled(self) -> bool:
        """Whether one example's gradient depends on the others in its batch (BatchNorm in training mode)."""
        return self.training and any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in self.module.modules())

    @property
    def head(self) -> Head | None:
        """The last linear layer with one output per class, or None."""
        layers = [
            (name, m)
            for name, m in self.module.named_modules()
            if isinstance(m, nn.Linear) and m.out_features == self.num_classes
        ]
        if not layers:
            return None
        name, layer = layers[-1]
        prefix = f"{name}." if name else ""
        return Head(f"{prefix}weight", f"{prefix}bias" if layer.bias is not None else None)

    def initial(self) -> tuple[Params, Buffers]:
        """Copies of the module's own parameters and buffers."""
        params = {k: v.detach().clone() for k, v in self.module.named_parameters()}
        return params, {k: v.detach().clone() for k, v in self.module.named_buffers()}

    def to(self, device: torch.device) -> Victim:
        """The same victim with its constants on ``device``."""
        move = {k: getattr(self, k).to(device) for k in ("mean", "std") if getattr(self, k) is not None}
        return dataclasses.replace(self, **move)

    def logits(
        self, params: Params, buffers: Buffers, inputs: Tensor, *, training: bool | None = None
    ) -> tuple[Tensor, Buffers]:
        """Scores [B, classes] for inputs [B, C, H, W] in [0, 1], and the buffers after this pass. Mutates nothing."""
        output, after = self._output(params, buffers, inputs, training)
        return (output.logits if isinstance(output, Penalised) else output), after

    def losses(self, params: Params, buffers: Buffers, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Buffers]:
        """The loss of every example [B], and the buffers after it. A model's own penalty is part of the loss."""
        output, after = self._output(params, buffers, inputs, None)
        if isinstance(output, Penalised):
            return self.loss(output.logits, labels) + output.penalty, after
        return self.loss(output, labels), after

    def objective(self, params: Params, buffers: Buffers, batch: Batch) -> tuple[Tensor, Buffers]:
        """Mean loss over the real examples of one batch [B, ...] (scalar), and the buffers after it."""
        losses, after = self.losses(params, buffers, batch.inputs, batch.labels)
        return (losses * batch.mask).sum() / batch.mask.sum().clamp(min=1), after

    def _output(
        self, params: Params, buffers: Buffers, inputs: Tensor, training: bool | None
    ) -> tuple[Tensor | Penalised, Buffers]:
        training = self.training if training is None else training
        if self.mean is not None and self.std is not None:
            inputs = (inputs - self.mean.view(-1, 1, 1)) / self.std.view(-1, 1, 1)
        if self.module.training != training:
            self.module.train(training)
        # BatchNorm writes its statistics in place: into copies, so that the caller's stay as they are
        after = {k: v.clone() for k, v in buffers.items()} if training else buffers
        return functional_call(self.module, (params, after), (inputs,)), after
