"""Where a search starts, in the searched coordinates (normalised pixels)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias, final

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gia_bench.attacks.checks import check
from gia_bench.errors import DataError

Initial: TypeAlias = Callable[[Sequence[int], torch.Generator, torch.dtype], Tensor]
"""(shape, generator on the CPU, dtype) -> a first guess on the CPU."""


@final
@dataclass(frozen=True)
class Randn:
    """Standard normal (Zhu et al. 2019, Geiping et al. 2020)."""

    def __call__(self, shape: Sequence[int], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
        return torch.randn(tuple(shape), generator=generator, dtype=dtype)


@final
@dataclass(frozen=True, kw_only=True)
class Uniform:
    """Uniform in [low, high)."""

    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        check(self.low < self.high, "uniform.low", self.low, f"a number below high={self.high}")

    def __call__(self, shape: Sequence[int], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
        return self.low + (self.high - self.low) * torch.rand(tuple(shape), generator=generator, dtype=dtype)


@final
@dataclass(frozen=True)
class Zeros:
    """All zeros: the mean image of the data, where the victim normalises. All restarts are the same."""

    def __call__(self, shape: Sequence[int], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
        return torch.zeros(tuple(shape), dtype=dtype)


@final
@dataclass(frozen=True, kw_only=True)
class Filled:
    """The same number everywhere. All restarts are the same."""

    value: float

    def __call__(self, shape: Sequence[int], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
        return torch.full(tuple(shape), self.value, dtype=dtype)


@final
@dataclass(frozen=True, kw_only=True)
class GivenImage:
    """The picture in a file, as an image in [0, 1] of the victim's size and channels: not yet in the searched
    coordinates. All images and restarts are the same. Raises ``DataError`` for a file that is absent or no picture.
    """

    path: str

    def __call__(self, shape: Sequence[int], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
        *_, C, H, W = shape
        try:
            with Image.open(self.path) as picture:
                levels = np.asarray(picture.convert("L" if C == 1 else "RGB").resize((W, H), Image.Resampling.BILINEAR))
        except OSError as error:  # PIL's own errors are of this kind
            raise DataError(f"initial.path={self.path!r} cannot be read as a picture: {error}") from error
        image = torch.from_numpy(levels.copy()).view(H, W, C).movedim(2, 0).to(dtype) / 255
        return image.expand(tuple(shape)).clone()


RANDN = Randn()


@final
@dataclass(frozen=True, kw_only=True)
class Patterned:
    """One square tile per image and channel, repeated over it (Wei et al. 2020, CPL). width: of the tile, in pixels;
    tile: what it is drawn from. At the right and lower border the tiles are cut.
    """

    width: int = 16
    tile: Initial = RANDN

    def __post_init__(self) -> None:
        check(self.width >= 1, "patterned.width", self.width, "at least 1")

    def __call__(self, shape: Sequence[int], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
        *images, H, W = shape
        w = self.width
        tile = self.tile((*images, w, w), generator, dtype)
        repeats = (*[1] * len(images), math.ceil(H / w), math.ceil(W / w))
        return tile.repeat(repeats)[..., :H, :W].contiguous()
