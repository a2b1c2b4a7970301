"""The LeNets of gradient inversion: sigmoid convolutions and one linear layer, twice differentiable everywhere."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

from gia_bench.models.shapes import ImageShape, num_features, require_positive


def lenet_zhu(input_shape: ImageShape, num_classes: int, *, width: int = 12) -> nn.Module:
    """Three 5x5 convolutions with strides 2, 2, 1: the LeNet of DLG (Zhu et al., NeurIPS 2019) and iDLG.

    width: channels of every convolution. The linear layer takes 768 numbers from 3x32x32 images and 588 from
    1x28x28. Raises ``ConfigError`` for width < 1.
    """
    return _lenet(input_shape, num_classes, width, strides=(2, 2, 1))


def lenet(input_shape: ImageShape, num_classes: int, *, width: int = 12) -> nn.Module:
    """Four 5x5 convolutions with strides 2, 2, 1, 1: the LeNet of Soteria (CVPR 2021) and GradDefense (INFOCOM 2022).

    width: channels of every convolution. Raises ``ConfigError`` for width < 1.
    """
    return _lenet(input_shape, num_classes, width, strides=(2, 2, 1, 1))


def _lenet(input_shape: ImageShape, num_classes: int, width: int, strides: Sequence[int]) -> nn.Module:
    require_positive("width", [width])
    layers: list[nn.Module] = []
    channels = input_shape[0]
    for stride in strides:
        layers += [nn.Conv2d(channels, width, kernel_size=5, stride=stride, padding=2), nn.Sigmoid()]
        channels = width
    features = nn.Sequential(*layers)
    head = nn.Linear(num_features(features, input_shape, "lenet"), num_classes)
    return nn.Sequential(OrderedDict(features=features, flatten=nn.Flatten(), fc=head))
