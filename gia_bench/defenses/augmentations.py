"""Image operations of ATS on 8-bit levels, pixel for pixel those of PIL, written for one image and mappable.

Every operation takes levels [C, H, W] (whole numbers 0..255 as float32; C = 1 or 3), its magnitude, and a sign (+1 or
-1, scalar tensor) for those that go either way; the result is of the same kind.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

Operation: TypeAlias = Callable[[Tensor, float, Tensor], Tensor]
"""(levels [C, H, W], magnitude, sign) -> levels."""

LUMA = (19595, 38470, 7471)  # ITU-R 601 in 1/65536, as PIL rounds them
ROTATION_FILL = 128.0


def luma(x: Tensor) -> Tensor:
    """Grey levels [1, H, W]; those of a grey image are its own."""
    if x.shape[0] == 1:
        return x
    weights = x.new_tensor(LUMA).view(3, 1, 1)
    return ((x * weights).sum(0, keepdim=True) + 32768).div(65536).floor()


def _enhance(away: Tensor, x: Tensor, magnitude: float, sign: Tensor) -> Tensor:
    """From ``away`` (factor 0) over the image (factor 1) and beyond; PIL cuts the fraction off."""
    factor = (1 + magnitude * sign.double()).float()
    return (away + factor * (x - away)).clamp(0, 255).floor()


def color(x: Tensor, magnitude: float, sign: Tensor) -> Tensor:
    """Away from or towards grey; leaves grey images alone."""
    return _enhance(luma(x), x, magnitude, sign)


def contrast(x: Tensor, magnitude: float, sign: Tensor) -> Tensor:
    """Away from or towards the mean grey."""
    mean = (luma(x).double().mean() + 0.5).floor().float()
    return _enhance(mean, x, magnitude, sign)


def brightness(x: Tensor, magnitude: float, sign: Tensor) -> Tensor:
    """Away from or towards black."""
    return _enhance(torch.zeros_like(x), x, magnitude, sign)


def sharpness(x: Tensor, magnitude: float, sign: Tensor) -> Tensor:
    """Away from or towards a 3x3 blur (weights 1, the middle 5), which leaves the border pixels as they are."""
    H, W = x.shape[-2:]
    if H < 3 or W < 3:
        return x
    total = 4 * x[:, 1:-1, 1:-1]
    for i in range(3):
        for j in range(3):
            total = total + x[:, i : H - 2 + i, j : W - 2 + j]
    middle = torch.nn.functional.pad((total / 13 + 0.5).floor(), (1, 1, 1, 1))
    inner = torch.nn.functional.pad(torch.ones_like(total), (1, 1, 1, 1))
    return _enhance(torch.where(inner > 0, middle, x), x, magnitude, sign)


def invert(x: Tensor, magnitude: float, sign: Tensor) -> Tensor:
    """The negative."""
    return 255 - x


def posterize(x: Tensor, magnitude: float, sign: Tensor) -> Tensor:
    """Keeps the highest ``magnitude`` bits."""
    step = 1 << (8 - int(magnitude))
    return (x / step).floor() * step


def solarize(x: Tensor, magnitude: float, sign: Tensor) -> Tensor:
    """The negative from the level ``magnitude`` on."""
    return torch.where(x < magnitude, x, 255 - x)


def autocontrast(x: Tensor, magnitude: float, sign: Tensor) -> Tensor:
    """Every channel stretched to 0..255; a channel of one level stays."""
    wide = x.double()  # in double, where PIL's fractions that fall just short of a whole number do so too
    low, high = wide.amin((1, 2), keepdim=True), wide.amax((1, 2), keepdim=True)
    scale = 255 / (high - low).clamp(min=1)
    stretched = (wide * scale + -low * scale).trunc().clamp(0, 255)
    return torch.where(high > low, stretched, wide).to(x.dtype)


def equalize(x: Tensor, magnitude: float, sign: Tensor) -> Tensor:
    """Every channel's levels spread so that all are about equally frequent."""
    flat = x.flatten(1).long()
    counts = torch.zeros(x.shape[0], 256, dtype=torch.int64, device=x.device)
    counts = counts.scatter_add(1, flat, torch.ones_like(flat))
    brightest = (flat == flat.amax(1, keepdim=True)).sum(1, keepdim=True)
    step = (flat.shape[1] - brightest) // 255
    below = counts.cumsum(1) - counts
    table = ((step // 2 + below) // step.clamp(min=1)).clamp(max=255)
    spread = table.gather(1, flat).view(x.shape).to(x.dtype)
    return torch.where(step[..., None] > 0, spread, x)


def shear_y(x: Tensor, magnitude: float, sign: Tensor, fill: float = 0.0) -> Tensor:
    """Columns moved in proportion to their distance from the left edge; cubic in between (PIL's, a = -1)."""
    column, row = _centres(x)
    y = row + magnitude * sign.double() * column
    inside = (y >= 0) & (y < x.shape[1])
    first = (y - 0.5).floor()
    d = (y - 0.5 - first).float()
    taps = [_pick(x, first + k, column.floor()) for k in (-1, 0, 1, 2)]
    slope = taps[2] - taps[0]
    bend = 2 * (taps[0] - taps[1]) + taps[2] - taps[3]
    twist = -taps[0] + taps[1] - taps[2] + taps[3]
    between = (taps[1] + d * (slope + d * (bend + d * twist))).clamp(0, 255).floor()
    return torch.where(inside, between, fill)


def translate_y(x: Tensor, magnitude: float, sign: Tensor, fill: float = 0.0) -> Tensor:
    """Up or down by ``magnitude`` times the height, to the nearest pixel."""
    column, row = _centres(x)
    return nearest(x, row + magnitude * x.shape[1] * sign.double(), column, fill)


def translate_x(x: Tensor, magnitude: float, sign: Tensor, fill: float = 0.0) -> Tensor:
    """Left or right by ``magnitude`` times the width, to the nearest pixel."""
    return translate_y(x.mT, magnitude, sign, fill).mT


def rotate(x: Tensor, magnitude: float, sign: Tensor) -> Tensor:
    """Counter-clockwise by ``magnitude`` degrees, always (the reference draws no sign here); corners are grey."""
    column, row = _centres(x)
    angle = -math.radians(magnitude)
    cos, sin = math.cos(angle), math.sin(angle)
    H, W = x.shape[-2:]
    dx, dy = column - W / 2, row - H / 2
    return nearest(x, -sin * dx + cos * dy + H / 2, cos * dx + sin * dy + W / 2, ROTATION_FILL)


def nearest(x: Tensor, row: Tensor, column: Tensor, fill: float) -> Tensor:
    """The pixels at fractional places (pixel i reaches from i to i + 1), ``fill`` outside of the image."""
    H, W = x.shape[-2:]
    row, column = row.floor(), column.floor()
    inside = (row >= 0) & (row < H) & (column >= 0) & (column < W)
    return torch.where(inside, _pick(x, row, column), fill)


def _centres(x: Tensor) -> tuple[Tensor, Tensor]:
    """Columns' [1, W] and rows' [H, 1] middles, in double."""
    H, W = x.shape[-2:]
    column = torch.arange(W, device=x.device, dtype=torch.float64) + 0.5
    row = torch.arange(H, device=x.device, dtype=torch.float64) + 0.5
    return column[None], row[:, None]


def _pick(x: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Pixels [C, H, W] at whole places, which broadcast to [H, W]; the edge repeats outside of the image."""
    H, W = x.shape[-2:]
    place = (row.clamp(0, H - 1) * W + column.clamp(0, W - 1)).long()
    return x.flatten(1).gather(1, place.flatten().expand(x.shape[0], -1)).view(x.shape)
