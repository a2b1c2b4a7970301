"""A small generator in the shape of DCGAN (Radford, Metz and Chintala 2016), and the critic it is trained against."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import final

import torch
from torch import Tensor, nn

from gia_bench.errors import ConfigError


@final
class Dcgan(nn.Module):
    """Latents [N, latent_dim] (standard normal) to images [N, C, H, W] in [0, 1].

    shape: (C, H, W), square; num_classes: of the labels it is told, as probabilities [N, num_classes] beside the
    latents, or None for a generator that is told none; channels: of its layers: the first is linear, each further one
    doubles height and width by a transposed convolution, and a last one of size 3 makes the image. With BatchNorm,
    whose running statistics are used outside training. Raises ``ConfigError`` for sizes that do not fit.

    layers: what it is made of, in order: the first takes latents and labels side by side, each other one what the one
    before gave.
    """

    def __init__(
        self, *, shape: Sequence[int], latent_dim: int, channels: Sequence[int], num_classes: int | None
    ) -> None:
        super().__init__()
        image_channels, size = _checked(shape, channels)
        if latent_dim < 1:
            raise ConfigError(f"generator.latent_dim={latent_dim}: give at least 1.")
        small, first = size >> len(channels) - 1, channels[0]
        layers = [
            nn.Sequential(
                nn.Linear(latent_dim + (num_classes or 0), first * small**2, bias=False),
                nn.Unflatten(1, (first, small, small)), nn.BatchNorm2d(first), nn.ReLU(),
            )
        ]  # fmt: skip
        for before, after in pairwise(channels):
            layers.append(
                nn.Sequential(nn.ConvTranspose2d(before, after, 4, 2, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU())
            )
        layers.append(nn.Sequential(nn.Conv2d(channels[-1], image_channels, 3, 1, 1), nn.Sigmoid()))
        self.layers = nn.ModuleList(layers)
        self.latent_dim, self.num_classes = latent_dim, num_classes

    def forward(self, latents: Tensor, classes: Tensor | None = None) -> Tensor:
        """The images."""
        x = latents if classes is None else torch.cat([latents, classes], 1)
        for layer in self.layers:
            x = layer(x)
        return x


@final
class Critic(nn.Module):
    """Images and their classes to one number each, the higher the more real; no BatchNorm, which WGAN-GP forbids.

    channels: of its convolutions, each of which halves height and width; the label enters as in a projection
    discriminator (Miyato and Koyama 2018): the inner product of the features with a learned vector of the class,
    divided by their number (gia_bench choice).
    """

    def __init__(self, *, shape: Sequence[int], channels: Sequence[int], num_classes: int | None) -> None:
        super().__init__()
        before, size = _checked(shape, channels)
        parts: list[nn.Module] = []
        for after in channels:
            parts += [nn.Conv2d(before, after, 4, 2, 1), nn.LeakyReLU(0.2)]
            before, size = after, size // 2
        self.features = nn.Sequential(*parts, nn.Flatten())
        self.score = nn.Linear(before * size**2, 1)
        self.classes = None if num_classes is None else nn.Linear(num_classes, before * size**2, bias=False)

    def forward(self, images: Tensor, classes: Tensor | None = None) -> Tensor:
        """[N]."""
        features = self.features(images)
        score: Tensor = self.score(features).squeeze(1)
        if self.classes is None or classes is None:
            return score
        conditional: Tensor = score + (features * self.classes(classes)).mean(1)
        return conditional


def _checked(shape: Sequence[int], channels: Sequence[int]) -> tuple[int, int]:
    """The image's channels and size."""
    image_channels, height, width = shape
    if not channels or min(channels) < 1:
        raise ConfigError(f"generator.channels={list(channels)}: give one number of at least 1 per layer.")
    step = 2 ** (len(channels) - 1)
    if height != width or height % step:
        raise ConfigError(
            f"A generator with {len(channels)} layers makes square images whose size {step} divides, and these are "
            f"{height}x{width}; give generator.channels another length, or resize the dataset with dataset.size."
        )
    return image_channels, height
