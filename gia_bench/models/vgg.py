"""VGG with BatchNorm and a single linear layer, as DGP trains it."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from gia_bench.models.shapes import ImageShape, output_shape


def vgg16_bn(input_shape: ImageShape, num_classes: int) -> nn.Module:
    """The thirteen convolutions of VGG-16 with BatchNorm, then one linear layer of 512 inputs; no dropout.

    What is left of the image after five poolings is averaged (1x1 for 32x32 images, where nothing changes;
    for larger ones a gia_bench choice). Images from 32x32 pixels; ``ConfigError`` for smaller ones. Source: code of
    DGP (AAAI 2024).
    """
    layers: list[nn.Module] = []
    channels = input_shape[0]
    for stage in ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512)):
        for wider in stage:
            layers += [nn.Conv2d(channels, wider, kernel_size=3, padding=1), nn.BatchNorm2d(wider), nn.ReLU()]
            channels = wider
        layers.append(nn.MaxPool2d(2))
    features = nn.Sequential(*layers)
    output_shape(features, input_shape, "vgg16_bn")
    head = nn.Linear(512, num_classes)
    return nn.Sequential(OrderedDict(features=features, pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), fc=head))
