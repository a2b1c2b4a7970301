"""The layer that a malicious server puts in front of a model: its weight gradients are made of the images."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeAlias, final

import torch
from torch import Tensor, nn

from gia_bench.errors import IncompatibleError

IMPRINT = "imprint"
"""The name of the layer in the model that is sent; the model's own tensors keep theirs."""
WEIGHT, BIAS = f"{IMPRINT}.weight", f"{IMPRINT}.bias"
KERNELS = f"{IMPRINT}.sets.weight"
"""Of a layer behind ``IdentitySets``: their kernels."""

Activation: TypeAlias = Callable[[Tensor], Tensor]


def unit_band(values: Tensor) -> Tensor:
    """Clamped to [0, 1]: a row is on only while it is inside."""
    return values.clamp(0, 1)


@final
class AddMean(nn.Module):
    """Adds gain * the mean over the rows to every pixel ("addition"): the model still sees the image."""

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        self.gain = gain

    def forward(self, images: Tensor, hidden: Tensor) -> Tensor:
        """images [B, C, H, W], hidden [B, K] -> [B, C, H, W]."""
        return images + self.gain * hidden.mean(-1).view(-1, *[1] * (images.ndim - 1))


@final
class Spread(nn.Module):
    """Puts one number in the place of the whole image ("linear"): the sum over the rows / gain, plus ``offset``."""

    def __init__(self, num_rows: int, num_pixels: int, gain: float, offset: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((num_pixels, num_rows), 1 / gain))
        self.bias = nn.Parameter(torch.full((num_pixels,), offset))

    def forward(self, images: Tensor, hidden: Tensor) -> Tensor:
        """images [B, C, H, W], hidden [B, K] -> [B, C, H, W]."""
        return nn.functional.linear(hidden, self.weight, self.bias).view(images.shape)


@final
class IdentitySets(nn.Module):
    """3x3 kernels, copies * C + 1 for each of ``num_sets`` clients (identity mapping sets, Zhao et al., S&P 2024).

    Those of the set ``active`` hand every channel of the image on, ``copies`` times, times ``scale``, and a last one
    gives ``scale`` everywhere. The others are 0, and nothing of the image reaches what they lead to.
    """

    def __init__(self, num_sets: int, channels: int, copies: int, active: int, scale: float) -> None:
        super().__init__()
        of_set = copies * channels + 1
        weight, bias = torch.zeros(num_sets, of_set, channels, 3, 3), torch.zeros(num_sets, of_set)
        for repeat in range(copies):
            weight[active, range(repeat * channels, (repeat + 1) * channels), range(channels), 1, 1] = scale
        bias[active, -1] = scale
        self.weight, self.bias = nn.Parameter(weight.flatten(0, 1)), nn.Parameter(bias.flatten())

    def forward(self, images: Tensor) -> Tensor:
        """images [B, C, H, W] -> [B, num_sets * (copies * C + 1), H, W]."""
        return nn.functional.conv2d(images, self.weight, self.bias, padding=1)


@final
class ImprintBlock(nn.Module):
    """activation(weight x + bias) on the flattened image, handed on so that every row that an image switches on gets
    the same gradient from it. weight: [K, N], bias: [K], N = C * H * W; connection: (images, hidden [B, K]) -> images;
    sets: what the image goes through before the layer, with N outputs in all, or None.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor,
        connection: nn.Module,
        activation: Activation = torch.relu,
        sets: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight.clone()), nn.Parameter(bias.clone())
        self.connection, self.sets, self.activation = connection, sets, activation

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W], as the model would see them, to what it sees instead."""
        seen = images if self.sets is None else self.sets(images)
        hidden = self.activation(nn.functional.linear(seen.flatten(1), self.weight, self.bias))
        result: Tensor = self.connection(images, hidden)
        return result


def in_front(block: nn.Module, model: nn.Module) -> nn.Module:
    """A copy of ``model`` whose images go through ``block`` first. The model's own tensors keep their names, so that
    what a defense remembers of them stays theirs. Raises ``IncompatibleError`` where that cannot be done.
    """
    own_forward = isinstance(model, nn.Sequential) and type(model).forward is not nn.Sequential.forward
    if hasattr(model, IMPRINT) or own_forward:
        raise IncompatibleError(
            f"No layer can be put in front of {type(model).__name__}: it is a Sequential with a forward of its own, or "
            f"has a part named {IMPRINT!r}; take another model."
        )
    implanted = copy.deepcopy(model)
    # the first of its layers: some parts of the program take a model's last layer for its head
    implanted._modules = {IMPRINT: block.train(model.training), **implanted._modules}
    if not isinstance(implanted, nn.Sequential):  # which calls its layers in their order
        implanted.register_forward_pre_hook(_through)
    return implanted


def _through(model: nn.Module, arguments: tuple[Any, ...]) -> tuple[Tensor]:
    block = model.get_submodule(IMPRINT)
    return (block(arguments[0]),)
