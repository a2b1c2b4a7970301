"""The shape that a network makes of an image, found without computing anything."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call

from gia_bench.errors import ConfigError
from gia_bench.models.functional import Penalised

ImageShape: TypeAlias = tuple[int, int, int]
"""(C, H, W)."""

LARGEST_SIDE = 512
"""Where the search for an image size that fits gives up, in pixels."""


def output_shape(network: nn.Module, input_shape: ImageShape, name: str) -> tuple[int, ...]:
    """The shape of ``network``'s output for one image, without the batch axis.

    Raises ``ConfigError`` with the smallest square image that fits, if this one does not.
    """
    try:
        return _dry_run(network, input_shape)
    except (RuntimeError, ValueError, AssertionError, IndexError) as error:
        channels, height, width = input_shape
        smallest = _smallest_side(network, channels)
        if smallest is not None and smallest > min(height, width):
            raise ConfigError(
                f"model: {name} takes images from {smallest}x{smallest} pixels, got {height}x{width}; "
                "choose another model, or resize the images of the dataset."
            ) from error
        hint = f" It takes {smallest}x{smallest}." if smallest else ""
        reason = str(error).split("\n", 1)[0]
        raise ConfigError(f"model: {name} cannot take images of shape {list(input_shape)}: {reason}.{hint}") from error


def num_features(features: nn.Module, input_shape: ImageShape, name: str) -> int:
    """How many numbers per image reach the layer after ``features``. Raises like ``output_shape``."""
    return torch.Size(output_shape(features, input_shape, name)).numel()


def require_positive(name: str, sizes: Sequence[int]) -> None:
    """Raises ``ConfigError`` if the model field ``name`` holds a size below 1."""
    if any(size < 1 for size in sizes):
        raise ConfigError(f"model.network.{name} must be at least 1, got {list(sizes)}.")


def _smallest_side(network: nn.Module, channels: int) -> int | None:
    for side in range(1, LARGEST_SIDE + 1):
        try:
            _dry_run(network, (channels, side, side))
        except (RuntimeError, ValueError, AssertionError, IndexError):
            continue
        return side
    return None


def _dry_run(network: nn.Module, input_shape: ImageShape) -> tuple[int, ...]:
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    # two images: BatchNorm in training mode refuses a single value per channel, which is not a matter of the shape
    images = torch.empty(2, *input_shape, device="meta")
    output = functional_call(network, {k: torch.empty_like(v, device="meta") for k, v in tensors.items()}, (images,))
    if isinstance(output, Penalised):
        output = output.logits
    if not isinstance(output, Tensor):
        raise ConfigError(f"model: the network must return one tensor of scores, got {type(output).__name__}.")
    return tuple(output.shape[1:])
