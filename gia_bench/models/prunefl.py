"""The models of PruneFL (Jiang et al., TNNLS 2022), which PriPrune's Conv-2 and VGG-11 follow. No BatchNorm."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from gia_bench.models.shapes import ImageShape, num_features


def conv2(input_shape: ImageShape, num_classes: int) -> nn.Module:
    """Two 5x5 convolutions (32, 64), each with ReLU and max pooling, and a hidden layer of 2048.

    Images from 4x4 pixels; ``ConfigError`` for smaller ones. Source: PruneFL's code (FEMNIST: 3136 numbers reach
    the hidden layer).
    """
    features = nn.Sequential(
        nn.Conv2d(input_shape[0], 32, kernel_size=5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, kernel_size=5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
    )
    classifier = nn.Sequential(
        nn.Linear(num_features(features, input_shape, "conv2"), 2048), nn.ReLU(), nn.Linear(2048, num_classes)
    )
    return nn.Sequential(OrderedDict(features=features, flatten=nn.Flatten(), classifier=classifier))


def vgg11(input_shape: ImageShape, num_classes: int) -> nn.Module:
    """VGG-11 (Simonyan and Zisserman 2015) without BatchNorm, with two hidden layers of 512.

    Images from 32x32 pixels; ``ConfigError`` for smaller ones. Source: PruneFL's code (CIFAR-10).
    """
    layers: list[nn.Module] = []
    channels = input_shape[0]
    for stage in ((64,), (128,), (256, 256), (512, 512), (512, 512)):
        for wider in stage:
            layers += [nn.Conv2d(channels, wider, kernel_size=3, padding=1), nn.ReLU()]
            channels = wider
        layers.append(nn.MaxPool2d(2))
    features = nn.Sequential(*layers)
    classifier = nn.Sequential(
        nn.Linear(num_features(features, input_shape, "vgg11"), 512),
        nn.ReLU(),
        nn.Linear(512, 512),
        nn.ReLU(),
        nn.Linear(512, num_classes),
    )
    return nn.Sequential(OrderedDict(features=features, flatten=nn.Flatten(), classifier=classifier))
