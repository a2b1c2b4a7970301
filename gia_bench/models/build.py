"""From a network's factory and the settings of ``conf/model`` to the victim that everybody knows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

import torch
from torch import nn

from gia_bench.errors import ConfigError, choices
from gia_bench.models.checkpoint import load_checkpoint
from gia_bench.models.functional import Loss, Victim, binary_cross_entropy, cross_entropy
from gia_bench.models.initialisation import INITIALISATIONS
from gia_bench.models.shapes import ImageShape, output_shape
from gia_bench.seeding import seeded

Network: TypeAlias = Callable[[ImageShape, int], nn.Module]
"""(input_shape, num_classes) -> a module that maps images [B, C, H, W] to scores [B, num_classes]."""

LOSSES: dict[str, Loss] = {"cross_entropy": cross_entropy, "binary_cross_entropy": binary_cross_entropy}


def unchanged(module: nn.Module) -> nn.Module:
    """The architecture as the network's factory made it."""
    return module


def build_victim(
    network: Network,
    *,
    input_shape: Sequence[int],
    num_classes: int,
    mean: Sequence[float],
    std: Sequence[float],
    normalize: bool = False,
    loss: str = "cross_entropy",
    init: str = "default",
    checkpoint: str | Path | None = None,
    training: bool = True,
    seed: int = 0,
    prepare: Callable[[nn.Module], nn.Module] = unchanged,
) -> Victim:
    """The model that is trained and attacked, with its first weights: a pure function of the arguments.

    network: one of the factories of ``gia_bench.models`` (as ``functools.partial`` of its fields), or your own;
    input_shape: (C, H, W); mean, std: the dataset's, per channel, used if ``normalize``; loss: a name in ``LOSSES``;
    init: a name in ``INITIALISATIONS``; checkpoint: a file of trained weights, read last, or None; training: whether
    clients train in training mode; prepare: what a defense changes in the architecture, after the initialisation, which
    is of the network's own layers. Raises ``ConfigError`` for unknown names, images that the network cannot take or
    outputs that are not [B, num_classes], and ``DataError`` for a checkpoint that cannot be used.
    """
    if loss not in LOSSES:
        raise ConfigError(choices("model.loss", loss, LOSSES))
    if init not in INITIALISATIONS:
        raise ConfigError(choices("model.init", init, INITIALISATIONS))
    shape = _image_shape(input_shape)
    if num_classes < 1:
        raise ConfigError(f"num_classes must be at least 1, got {num_classes}.")
    with seeded(seed, "model"):
        module = network(shape, num_classes)
        INITIALISATIONS[init](module)
        # afterwards: the rule is that of the model's own layers, and a defense knows how its layers start
        module = prepare(module)
    made = output_shape(module, shape, type(module).__name__)
    if made != (num_classes,):
        raise ConfigError(
            f"model.network must give {num_classes} scores per image, got an output of shape {list(made)}."
        )
    if checkpoint is not None:
        load_checkpoint(module, checkpoint)
    return Victim(
        module=module,
        input_shape=shape,
        num_classes=num_classes,
        loss=LOSSES[loss],
        mean=_per_channel("mean", mean, shape) if normalize else None,
        std=_per_channel("std", std, shape) if normalize else None,
        training=training,
    )


def _image_shape(shape: Sequence[int]) -> ImageShape:
    if len(shape) != 3 or min(shape) < 1:
        raise ConfigError(f"input_shape must be (channels, height, width), each at least 1, got {list(shape)}.")
    return int(shape[0]), int(shape[1]), int(shape[2])


def _per_channel(name: str, values: Sequence[float], shape: ImageShape) -> torch.Tensor:
    tensor = torch.as_tensor(values, dtype=torch.get_default_dtype()).flatten()
    if len(tensor) != shape[0]:
        raise ConfigError(f"{name} must hold one number per channel ({shape[0]}), got {tensor.tolist()}.")
    if name == "std" and not (tensor > 0).all():
        raise ConfigError(f"std must be positive in every channel, got {tensor.tolist()}.")
    return tensor
