"""The network of R-GAP: strided convolutions without biases and activations that can be undone."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

from gia_bench.errors import ConfigError
from gia_bench.models.shapes import ImageShape, num_features, require_positive

KERNELS = (4, 3, 3, 3, 3, 3)
STRIDES = (2, 2, 1, 1, 2, 1)
PADDINGS = (2, 1, 1, 1, 1, 1)


def cnn6(
    input_shape: ImageShape,
    num_classes: int,
    *,
    channels: Sequence[int] = (12, 36, 36, 36, 64, 128),
    slope: float = 0.2,
) -> nn.Module:
    """Six convolutions with LeakyReLU and one linear layer, no biases (Zhu & Blaschko, ICLR 2021, code).

    channels: of the six convolutions; the paper's CNN6-d (fewer equations than pixels) is (12, 20, 36, 36, 64, 128).
    slope: of the LeakyReLU for negative numbers, in (0, 1]. The linear layer takes 3200 numbers from 3x32x32 images. It
    has one output per class; the paper's has a single one with a logistic loss, which is num_classes=1 with
    binary_cross_entropy, and in effect two classes with cross_entropy. Raises ``ConfigError`` for other than six
    channels, one below 1, or another slope.
    """
    require_positive("channels", channels)
    if len(channels) != len(KERNELS):
        raise ConfigError(f"model.network.channels must name {len(KERNELS)} convolutions, got {list(channels)}.")
    if not 0 < slope <= 1:
        raise ConfigError(f"model.network.slope={slope}: give a number above 0, up to 1.")
    layers: list[nn.Module] = []
    before = input_shape[0]
    for wanted, kernel, stride, padding in zip(channels, KERNELS, STRIDES, PADDINGS, strict=True):
        layers += [nn.Conv2d(before, wanted, kernel, stride, padding, bias=False), nn.LeakyReLU(slope)]
        before = wanted
    features = nn.Sequential(*layers)
    head = nn.Linear(num_features(features, input_shape, "cnn6"), num_classes, bias=False)
    return nn.Sequential(OrderedDict(features=features, flatten=nn.Flatten(), fc=head))
