"""Small forms of one tensor: a narrower float, whole multiples of one unit, or signs of one magnitude."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from gia_bench.wire.bits import bits_of, packed_bits, unpacked_bits

_PROBE = 256


@final
@dataclass(frozen=True)
class Cast:
    """Entries as ``dtype``: two bytes each for float16 and bfloat16."""

    dtype: torch.dtype
    num_parts: int = 1

    @property
    def name(self) -> str:
        """The dtype's name."""
        return str(self.dtype).removeprefix("torch.")

    def pack(self, row: Tensor) -> tuple[Tensor, ...] | None:
        """The narrow floats."""
        small = row.to(self.dtype)
        return (small,) if _same(small.to(row.dtype), row) else None

    def unpack(self, parts: tuple[Tensor, ...], num_entries: int, dtype: torch.dtype) -> Tensor:
        """The wide floats."""
        return parts[0].to(dtype)


@final
@dataclass(frozen=True)
class Codes:
    """Entries as whole numbers from -levels to levels in ceil(log2(2 levels + 1)) bits each, and their unit.

    levels: 1 to 127. The unit is searched as the largest magnitude / k, k = levels ... 1: whatever defense made the
    tensor, nothing but the update has to be known.
    """

    levels: int
    num_parts: int = 2

    @property
    def name(self) -> str:
        """With the number of levels."""
        return f"codes{self.levels}"

    @property
    def width(self) -> int:
        """Bits per entry."""
        return (2 * self.levels).bit_length()

    def pack(self, row: Tensor) -> tuple[Tensor, ...] | None:
        """The codes (uint8, packed) and the unit [1]; None for NaN and infinity, which have no code."""
        if not row.isfinite().all():
            return None
        for unit in self._units(row):
            codes = self._codes(row, unit)
            if _same(codes * unit, row):
                return self._packed((codes + self.levels).to(torch.uint8)), unit.view(1)
        return None

    def unpack(self, parts: tuple[Tensor, ...], num_entries: int, dtype: torch.dtype) -> Tensor:
        """Codes times unit."""
        whole, unit = parts
        if self.width < 8:
            planes = unpacked_bits(whole, num_entries * self.width).view(num_entries, self.width)
            weights = 2 ** torch.arange(self.width, dtype=torch.uint8, device=whole.device)
            whole = (planes * weights).sum(1, dtype=torch.uint8)
        return (whole.to(dtype) - self.levels) * unit

    def _packed(self, whole: Tensor) -> Tensor:
        if self.width == 8:
            return whole
        places = torch.arange(self.width, dtype=torch.uint8, device=whole.device)
        return packed_bits((whole[:, None] >> places) & 1)

    def _codes(self, row: Tensor, unit: Tensor) -> Tensor:
        # adding 0 turns -0.0 into 0.0: a code has no sign of zero
        return (row / unit).round().clamp(-self.levels, self.levels) + 0.0

    def _units(self, row: Tensor) -> Tensor:
        """The units [u] that fit the smallest and the largest entry and some others; one more look at all decides."""
        magnitudes = row.abs()
        largest = magnitudes.amax() if row.numel() else row.new_zeros(())
        if not largest > 0:
            return row.new_ones(1)
        smallest = torch.where(magnitudes > 0, magnitudes, largest).amin()
        units = largest / torch.arange(self.levels, 0, -1, device=row.device)
        probe = torch.cat([row[:_PROBE], smallest.view(1), largest.view(1)])
        fits = (self._codes(probe, units[:, None]) * units[:, None] == probe).all(1)
        return units[fits & (units > 0)]


@final
@dataclass(frozen=True)
class Signs:
    """Entries of one magnitude: a bit each, and the magnitude."""

    num_parts: int = 2

    @property
    def name(self) -> str:
        """The form's name."""
        return "signs"

    def pack(self, row: Tensor) -> tuple[Tensor, ...] | None:
        """The sign bits (uint8, packed) and the magnitude [1]."""
        magnitude = row[:1].abs()
        negative = row.signbit()
        return (packed_bits(negative), magnitude) if _same(self._signed(negative, magnitude), row) else None

    def unpack(self, parts: tuple[Tensor, ...], num_entries: int, dtype: torch.dtype) -> Tensor:
        """Plus or minus the magnitude."""
        return self._signed(unpacked_bits(parts[0], num_entries), parts[1])

    def _signed(self, negative: Tensor, magnitude: Tensor) -> Tensor:
        return torch.where(negative, -magnitude, magnitude)


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(bits_of(a), bits_of(b))
