"""Curious Abandon Honesty: trap weights switch each row of a planted layer on for few images (Boenisch et al. 2023)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import final

import torch
from torch import Tensor

from gia_bench.attacks.base import FORGET, Attack, Broadcast, Snapshots
from gia_bench.attacks.checks import check
from gia_bench.attacks.imprint import CONNECTIONS, check_block, implanted, quotients, read_images
from gia_bench.attacks.scene import PixelSpace
from gia_bench.models.functional import Victim
from gia_bench.models.imprint import ImprintBlock
from gia_bench.seeding import stream
from gia_bench.threat import Knowledge, Power
from gia_bench.values import Examples, Observation, Reconstruction


@final
@dataclass(frozen=True, kw_only=True)
class CuriousAbandonHonesty(Attack):
    """A row that one image of the batch alone switches on has that image times the bias's entry as its gradient.

    Trap weights: a random half of a row's N weights is -|N(mu, sigma^2)|, and the other half is the same numbers, in
    another order, times -scale. With scale < 1 the negative half outweighs the other on most images. They are made for
    images in [0, 1]; a victim's normalisation is undone in the layer. The bias is otherwise 0.

    num_rows: of the layer; sigma > 0; mu; scale in (0, 1]; connection, gain, labels: as in ``RobbingTheFed``;
    tolerance: a row is on where its bias entry is more than this share of the largest; explained_within: an image of
    which less is left (root of the mean square, pixels in [0, 1]) shows nothing new.

    Which rows show one image and which a mixture cannot be seen in a row, and rows that the same images switch on agree
    whatever they show. So images outside [0, 1] (mixtures with gradients of both signs) are left out, and of the rest
    those are taken of which the others are mixtures (gia_bench choices; breaching takes the rows it finds).
    """

    num_rows: int = 64
    sigma: float = 0.5
    mu: float = 0.0
    scale: float = 0.95
    connection: str = "addition"
    gain: float = 1e-3
    tolerance: float = 1e-6
    explained_within: float = 0.01
    labels: str = "auto"

    def __post_init__(self) -> None:
        check_block(self.num_rows, self.connection, self.gain, self.labels)
        check(0 < self.sigma < math.inf, "attack.sigma", self.sigma, "a number above 0")
        check(math.isfinite(self.mu), "attack.mu", self.mu, "a finite number")
        check(0 < self.scale <= 1, "attack.scale", self.scale, "a number in (0, 1]")
        check(0 <= self.tolerance < 1, "attack.tolerance", self.tolerance, "a share in [0, 1)")
        check(self.explained_within >= 0, "attack.explained_within", self.explained_within, "at least 0")

    @property
    def requires(self) -> Knowledge:
        return Knowledge.NUM_EXAMPLES | (Knowledge.LABELS if self.labels == "known" else Knowledge.NONE)

    @property
    def needs(self) -> Power:
        return Power.CHANGE_MODEL

    @property
    def max_local_steps(self) -> int | None:
        """A second step sees other rows than were sent."""
        return 1

    def trap_weights(self, num_pixels: int, generator: torch.Generator) -> Tensor:
        """[num_rows, N] float64, for images in [0, 1]."""
        half = num_pixels // 2
        places = torch.rand(self.num_rows, num_pixels, generator=generator).argsort(1)
        drawn = torch.randn(self.num_rows, half, generator=generator, dtype=torch.float64)
        negative = -(self.mu + self.sigma * drawn).abs()
        order = torch.rand(self.num_rows, half, generator=generator).argsort(1)
        weights = negative.new_zeros(self.num_rows, num_pixels)
        weights.scatter_(1, places[:, :half], negative)
        # of an odd number of pixels one stays 0
        return weights.scatter(1, places[:, half : 2 * half], -self.scale * negative.gather(1, order))

    def tamper(self, honest: Broadcast, *, seed: int, public: Examples | None = None) -> Broadcast:
        """The honest model behind the layer."""
        victim, like = honest.victim, next(iter(honest.params.values()))
        N = prod(victim.input_shape)
        weights = self.gain * self.trap_weights(N, stream(seed, "trap_weights"))
        space = PixelSpace.of(victim, weights.cpu())
        std, mean = (t.expand(victim.input_shape).flatten() for t in (space.std, space.mean))
        block = ImprintBlock(
            (weights * std).to(like),
            (weights @ mean).to(like),
            CONNECTIONS[self.connection](self.num_rows, N, self.gain, 0.0).to(like),
        )
        return implanted(block, honest)

    def reconstruct_many(
        self,
        observations: Sequence[Observation],
        victim: Victim,
        *,
        seeds: Sequence[int],
        snapshots: Snapshots = FORGET,
    ) -> list[Reconstruction]:
        def read(rows: Tensor, entries: Tensor, B: int) -> Tensor:
            images, _ = quotients(rows, entries, self.tolerance, float(entries.abs().max()))
            shaped = images.view(-1, *victim.input_shape)
            shown = PixelSpace.of(victim, images).decode(shaped).flatten(1)
            return images[_corners(shown, B, self.explained_within)]

        return [read_images(o, victim, self.labels, read) for o in observations]


def _corners(images: Tensor, most: int, within: float) -> list[int]:
    """Places of at most ``most`` rows of images [n, N] of which the others are mixtures: always the one that lies
    farthest off the span of those taken so far (successive projections, Araujo et al. 2001).
    """
    outside = (images - images.clamp(0, 1)).abs().amax(1) > within
    # weights of a mixture sum to 1; with this, a black image is no mixture of nothing
    left = torch.cat([images, images.new_full((len(images), 1), 0.5 * math.sqrt(images.shape[1]))], 1)
    left[outside] = 0
    chosen: list[int] = []
    while len(chosen) < min(most, len(images)):
        lengths = left.square().sum(1).sqrt()
        place = int(lengths.argmax())
        if float(lengths[place]) <= within * math.sqrt(images.shape[1]):
            break
        chosen.append(place)
        direction = left[place] / lengths[place]
        left = left - (left @ direction)[:, None] * direction
    return chosen
