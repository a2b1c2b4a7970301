"""The ConvNet that Inverting Gradients and GradDefense attack."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from gia_bench.models.shapes import ImageShape, num_features, require_positive


def convnet(input_shape: ImageShape, num_classes: int, *, width: int = 64) -> nn.Module:
    """Eight 3x3 convolutions, each with BatchNorm and ReLU, a max pooling of 3 after the sixth and the eighth.

    width: channels of the first convolution; the others have 2, 2, 4, 4, 4, 4, 4 times as many. Images from 9x9
    pixels. Raises ``ConfigError`` for smaller ones and for width < 1. Source: code of GradDefense (INFOCOM 2022),
    after Geiping et al. (NeurIPS 2020): 2,904,970 parameters at width 64 with 10 classes and 3x32x32 images.
    """
    require_positive("width", [width])
    layers: list[nn.Module] = []
    channels = input_shape[0]
    for block in ((1, 2, 2, 4, 4, 4), (4, 4)):
        for factor in block:
            layers += [
                nn.Conv2d(channels, factor * width, kernel_size=3, padding=1),
                nn.BatchNorm2d(factor * width),
                nn.ReLU(),
            ]
            channels = factor * width
        layers.append(nn.MaxPool2d(3))
    features = nn.Sequential(*layers)
    head = nn.Linear(num_features(features, input_shape, f"convnet{width}"), num_classes)
    return nn.Sequential(OrderedDict(features=features, flatten=nn.Flatten(), fc=head))
