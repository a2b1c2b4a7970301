"""Where images come from: one split is a ``Source``, a train and a test split are a ``Dataset``.

Images live in [0, 1] everywhere; normalisation belongs to the model, so a dataset only knows the numbers for it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, final

import torch
from PIL.Image import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from gia_bench.errors import ConfigError, DataError
from gia_bench.values import Examples


class Source(Examples, Protocol):
    """One split; where its examples have writers, ``groups`` is [N] int64, else None."""

    @property
    def groups(self) -> Tensor | None: ...


@final
@dataclass(frozen=True, eq=False)
class InMemory:
    """A split that fits in memory: ``pixels`` [N, C, H, W], uint8 in 0..255 or float in [0, 1]."""

    pixels: Tensor
    labels: Tensor
    groups: Tensor | None = None

    def __post_init__(self) -> None:
        lengths = {len(t) for t in (self.pixels, self.labels, self.groups) if t is not None}
        if self.pixels.ndim != 4 or len(lengths) > 1:
            raise DataError(
                f"Images {tuple(self.pixels.shape)} and {len(self.labels)} labels do not fit together; "
                "expected images [N, C, H, W], N labels and, where there are writers, N groups."
            )
        if self.pixels.is_floating_point() and not bool(((self.pixels >= 0) & (self.pixels <= 1)).all()):
            raise DataError("Images given as floats must lie in [0, 1]; divide them by their largest value.")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        channels, height, width = self.pixels.shape[1:]
        return channels, height, width

    def __len__(self) -> int:
        return len(self.labels)

    def images(self, indices: Tensor) -> Tensor:
        return unit_interval(self.pixels[indices])


class Pictures(Protocol):
    """What torchvision's image datasets are: a picture and its class, read when asked for."""

    def __getitem__(self, index: int) -> tuple[Image, int]: ...


@final
@dataclass(frozen=True, eq=False)
class Lazy:
    """A split that is read picture by picture, for what does not fit in memory; always three channels.

    pictures: for example torchvision's ``ImageFolder``; rows: [N] which of its items belong to this split;
    labels: [N] int64; size: height and width in pixels. A picture's shorter side is resized to ``size`` (bilinear,
    antialiased) and its centre is cut out.
    """

    pictures: Pictures
    rows: Tensor
    labels: Tensor
    size: int
    groups: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return 3, self.size, self.size

    def __len__(self) -> int:
        return len(self.labels)

    def images(self, indices: Tensor) -> Tensor:
        if len(indices) == 0:
            return torch.empty(0, *self.shape)
        # padding repeats an index, and decoding is what takes the time: each picture once
        distinct, places = torch.unique(self.rows[indices], return_inverse=True)
        return unit_interval(torch.stack([self._square(self.pictures[row][0]) for row in distinct.tolist()]))[places]

    def _square(self, picture: Image) -> Tensor:
        smaller = transforms.resize(picture.convert("RGB"), [self.size], antialias=True)
        square: Tensor = transforms.pil_to_tensor(transforms.center_crop(smaller, [self.size, self.size]))
        return square


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class Dataset:
    """Real images with their classes, and what everybody knows of them.

    shape: (C, H, W); mean, std: per channel, for the model side; version: identifies what was loaded ("unverified"
    stands in it where checksums were skipped); unfit_targets: train indices that are not the original pixels and
    must never be attacked; notes: what a reader of a result has to know. Raises ``ConfigError`` for numbers that do
    not fit the channels and ``DataError`` for labels outside the classes.
    """

    name: str
    train: Source
    test: Source
    num_classes: int
    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    version: str
    unfit_targets: frozenset[int] = frozenset()
    notes: str = ""

    def __post_init__(self) -> None:
        for key, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != self.shape[0]:
                raise ConfigError(
                    f"dataset.{key} has {len(values)} numbers, but images of {self.name} have {self.shape[0]} "
                    "channels; give one number, or one per channel."
                )
        if min(self.std) <= 0:
            raise ConfigError(f"dataset.std={list(self.std)} must be positive; use 1.0 for no scaling.")
        for split, source in (("train", self.train), ("test", self.test)):
            if len(source) == 0:
                raise DataError(f"The {split} split of {self.name} is empty.")
            low, high = int(source.labels.min()), int(source.labels.max())
            if low < 0 or high >= self.num_classes:
                raise DataError(
                    f"The {split} labels of {self.name} reach from {low} to {high}, outside its {self.num_classes} "
                    "classes (0 is the first)."
                )


def unit_interval(pixels: Tensor) -> Tensor:
    """Float32 in [0, 1] from uint8 in 0..255; floats are in [0, 1] already."""
    return pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels.float()


def per_channel(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """One number per channel; a single number stands for all channels."""
    return tuple(float(v) for v in values) * (channels if len(values) == 1 else 1)


def fingerprint(*sources: InMemory) -> str:
    """Identifies what was loaded, pixel by pixel."""
    digest = hashlib.sha256()
    for source in sources:
        for tensor in (source.pixels, source.labels, source.groups):
            if tensor is not None:
                digest.update(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
                digest.update(tensor.flatten().numpy().data)
    return f"sha256:{digest.hexdigest()[:16]}"


def listing(files: Sequence[Path], folder: Path) -> str:
    """Identifies files by their names and sizes, without reading them."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(folder).as_posix()}\x1f{file.stat().st_size}\x1e".encode())
    return f"listing:{digest.hexdigest()[:16]}"
