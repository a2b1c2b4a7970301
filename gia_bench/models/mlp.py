"""Fully connected networks, whose first layer gives its input away in closed form."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from math import prod

from torch import nn

from gia_bench.errors import ConfigError, choices
from gia_bench.models.shapes import ImageShape, require_positive

ACTIVATIONS = {"relu": nn.ReLU, "sigmoid": nn.Sigmoid, "tanh": nn.Tanh}


def mlp(
    input_shape: ImageShape, num_classes: int, *, hidden: Sequence[int] = (1024, 1024), activation: str = "relu"
) -> nn.Module:
    """Linear layers with an activation between them.

    hidden: sizes of the hidden layers, may be empty (logistic regression); activation: relu, sigmoid or tanh.
    Raises ``ConfigError`` for a size below 1 or another activation. The default is PRECODE's MLP for CIFAR-10.
    """
    require_positive("hidden", hidden)
    if activation not in ACTIVATIONS:
        raise ConfigError(choices("model.network.activation", activation, ACTIVATIONS))
    layers: list[nn.Module] = []
    size = prod(input_shape)
    for wanted in hidden:
        layers += [nn.Linear(size, wanted), ACTIVATIONS[activation]()]
        size = wanted
    head = nn.Linear(size, num_classes)
    return nn.Sequential(OrderedDict(flatten=nn.Flatten(), features=nn.Sequential(*layers), fc=head))
