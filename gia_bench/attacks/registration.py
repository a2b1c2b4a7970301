"""What the restarts of a victim agree on: their mean, as they are or after each image was moved to where the group is.

Yin et al. 2021 (GradInversion) register the images with RANSAC-flow before they average them; its networks are no part
of gia_bench. The registration here is ours: whole-pixel translations, found by phase correlation. No rotation or scale.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from gia_bench.attacks.checks import check


class Registration(ABC):
    """Averages over restarts, image by image; nothing waits for the device."""

    @abstractmethod
    def mean(self, pixels: Tensor) -> Tensor:
        """[V, T, B, C, H, W] -> [V, 1, B, C, H, W]."""


@final
@dataclass(frozen=True)
class Unregistered(Registration):
    """The plain mean of pixels, as in GIFD's code."""

    def mean(self, pixels: Tensor) -> Tensor:
        return pixels.mean(1, keepdim=True)


@final
@dataclass(frozen=True, kw_only=True)
class Translation(Registration):
    """The mean of images that were first moved by whole pixels to the group's middle place (gia_bench's choice).

    Every image is compared with the same image of every restart. It moves by the median of these shifts, its own 0
    among them (of an even number the lower middle): a restart that matches nothing does not move the others. Pixels
    that come in from outside repeat the border. max_shift: how far two images may lie apart, as a fraction of the
    height and of the width; in [0, 0.5].
    """

    max_shift: float

    def __post_init__(self) -> None:
        check(0 <= self.max_shift <= 0.5, "registration.max_shift", self.max_shift, "a number in [0, 0.5]")

    def mean(self, pixels: Tensor) -> Tensor:
        return moved(pixels, to_the_middle(pixels, self.max_shift)).mean(1, keepdim=True)


def to_the_middle(pixels: Tensor, max_shift: float) -> Tensor:
    """How far each image of pixels [V, T, B, C, H, W] has to move: [V, T, B, 2] int64, down and to the right."""
    T = pixels.shape[1]
    # one restart against all others at a time: all pairs at once would need T times the memory
    shifts = torch.stack([shift(pixels, pixels[:, t : t + 1], max_shift) for t in range(T)])
    # sorted, because torch's own median is not deterministic on a GPU
    return shifts.sort(0).values[(T - 1) // 2]


def shift(moving: Tensor, fixed: Tensor, max_shift: float) -> Tensor:
    """How far ``moving`` has to move to lie on ``fixed``, both [..., C, H, W]: [..., 2] int64, down and to the right.

    Phase correlation: the highest point of the inverse transform of the cross spectrum, summed over the channels and
    divided by its magnitude. A Hann window takes away the borders, which else would speak for a shift of 0.
    """
    H, W = moving.shape[-2:]
    m, n = int(max_shift * H), int(max_shift * W)
    cross = (_spectrum(fixed) * _spectrum(moving).conj()).sum(-3)
    peaks = torch.fft.irfft2(cross / cross.abs().clamp(min=torch.finfo(moving.dtype).tiny), s=(H, W))
    down, right = (torch.arange(-k, k + 1, device=moving.device) for k in (m, n))
    best = peaks[..., (down % H)[:, None], right % W].flatten(-2).argmax(-1)
    return torch.stack([best // len(right) - m, best % len(right) - n], -1)


def moved(images: Tensor, by: Tensor) -> Tensor:
    """Images [..., C, H, W] moved by [..., 2] whole pixels, down and to the right; borders are repeated."""
    H, W = images.shape[-2:]
    rows, columns = (
        (torch.arange(size, device=by.device) - by[..., axis, None]).clamp(0, size - 1)
        for axis, size in enumerate((H, W))
    )
    images = images.gather(-2, rows[..., None, :, None].expand(images.shape))
    return images.gather(-1, columns[..., None, None, :].expand(images.shape))


def _spectrum(images: Tensor) -> Tensor:
    H, W = images.shape[-2:]
    down, right = (torch.hann_window(k, dtype=images.dtype, device=images.device) for k in (H, W))
    spectrum: Tensor = torch.fft.rfft2((images - images.mean((-2, -1), keepdim=True)) * down[:, None] * right)
    return spectrum
