"""ResNets for small images: the wide one with four stages, and those of He et al. for CIFAR with three."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias, final

from torch import Tensor, nn

from gia_bench.errors import ConfigError
from gia_bench.models.shapes import ImageShape, require_positive

Shortcut: TypeAlias = Callable[[int, int, int], nn.Module]
"""(channels in, channels out, stride) -> the way around a block that changes the shape."""


def resnet(input_shape: ImageShape, num_classes: int, *, depth: int = 18, width: int = 64) -> nn.Module:
    """ResNet-18 or ResNet-34 with the CIFAR stem: a 3x3 convolution instead of 7x7 and pooling.

    depth: 18 or 34; width: channels of the first stage, doubled by each of the next three. The mean over what is
    left of the image enters the linear layer, so any image size fits (with a batch of one, BatchNorm in training
    mode needs at least 9x9 pixels). Raises ``ConfigError`` for another depth. Source: He et al. (CVPR 2016), in the
    form that DGP (AAAI 2024) and most attacks use: 11,173,962 parameters at depth 18 with 10 classes.
    """
    blocks = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}
    if depth not in blocks:
        raise ConfigError(f"model.network.depth must be one of {', '.join(map(str, blocks))}, got {depth}.")
    require_positive("width", [width])
    return ResNet(input_shape[0], num_classes, blocks[depth], width, projection)


def cifar_resnet(input_shape: ImageShape, num_classes: int, *, depth: int = 20, width: int = 16) -> nn.Module:
    """ResNet-20, 32, 44, 56, ... for CIFAR, three stages with parameter-free shortcuts (option A).

    depth: 6n + 2 layers; width: channels of the first stage, doubled by each of the next two. Any image size fits.
    Parameter names are those of akamaster/pytorch_resnet_cifar10, whose trained weights load. Raises
    ``ConfigError`` for another depth. Source: He et al. (CVPR 2016), section 4.2.
    """
    blocks, rest = divmod(depth - 2, 6)
    if rest or blocks < 1:
        raise ConfigError(f"model.network.depth must be 6n + 2 (20, 32, 44, 56, ...), got {depth}.")
    require_positive("width", [width])
    return ResNet(
        input_shape[0], num_classes, (blocks,) * 3, width, lambda c_in, c_out, stride: Pad(c_out - c_in, stride)
    )


def projection(channels: int, wider: int, stride: int) -> nn.Module:
    """A 1x1 convolution and BatchNorm around a block (option B)."""
    return nn.Sequential(nn.Conv2d(channels, wider, kernel_size=1, stride=stride, bias=False), nn.BatchNorm2d(wider))


@final
class Pad(nn.Module):
    """Every ``stride``-th pixel, with zero channels added on both sides (option A)."""

    def __init__(self, added: int, stride: int) -> None:
        super().__init__()
        self.before, self.after, self.stride = added // 2, added - added // 2, stride

    def forward(self, x: Tensor) -> Tensor:
        thinned = x[:, :, :: self.stride, :: self.stride]
        return nn.functional.pad(thinned, (0, 0, 0, 0, self.before, self.after))


@final
class Block(nn.Module):
    """Two 3x3 convolutions with BatchNorm, and a shortcut around them."""

    def __init__(self, channels: int, wider: int, stride: int, shortcut: Shortcut) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, wider, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(wider)
        self.conv2 = nn.Conv2d(wider, wider, kernel_size=3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(wider)
        same = stride == 1 and channels == wider
        self.shortcut = nn.Identity() if same else shortcut(channels, wider, stride)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        inside = self.relu(self.bn1(self.conv1(x)))
        output: Tensor = self.relu(self.bn2(self.conv2(inside)) + self.shortcut(x))
        return output


@final
class ResNet(nn.Module):
    """A 3x3 stem, stages that halve the image and double the channels, the mean over pixels, a linear layer."""

    def __init__(self, channels: int, num_classes: int, blocks: Sequence[int], width: int, shortcut: Shortcut) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, kernel_size=3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.stages = [f"layer{i + 1}" for i in range(len(blocks))]
        last = width
        for i, (stage, count) in enumerate(zip(self.stages, blocks, strict=True)):
            wide = width * 2**i
            first = Block(last, wide, 1 if i == 0 else 2, shortcut)
            self.add_module(stage, nn.Sequential(first, *(Block(wide, wide, 1, shortcut) for _ in range(count - 1))))
            last = wide
        self.linear = nn.Linear(last, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        for stage in self.stages:
            x = self.get_submodule(stage)(x)
        scores: Tensor = self.linear(x.mean((-2, -1)))
        return scores
