"""Small forms of tensors: narrower floats, whole multiples of a unit, or signs of a magnitude."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import final

import torch
from torch import Tensor

from gia_bench.wire.bits import bits_of, packed_bits, unpacked_bits
from gia_bench.wire.narrow import Small

_PROBE = 32


@final
@dataclass(frozen=True)
class Cast:
    """Entries as ``dtype``: two bytes each for float16 and bfloat16."""

    dtype: torch.dtype

    @property
    def name(self) -> str:
        """The dtype's name."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def width(self) -> int:
        """Bits per entry."""
        return 8 * self.dtype.itemsize

    def pack(self, row: Tensor, sizes: Sequence[int]) -> Small:
        """The narrow floats. The bits of a NaN that is widened again depend on where it stands: none is held."""
        narrow = row.to(self.dtype)
        exact = _same(narrow.to(row.dtype), row, sizes) & ~_of_each(row.isnan(), sizes, torch.any)
        return Small(narrow, row[:0], exact)

    def unpack(self, entries: Tensor, units: Tensor, sizes: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The wide floats."""
        return entries.to(dtype)

    def to_bytes(self, entries: Tensor) -> Tensor:
        """The narrow floats themselves."""
        return entries

    def from_bytes(self, packed: Tensor, num_entries: int) -> Tensor:
        """The first ``num_entries`` of them."""
        return packed[:num_entries]


@final
@dataclass(frozen=True)
class Codes:
    """Entries as whole numbers from -levels to levels in ceil(log2(2 levels + 1)) bits each, and each tensor's unit.

    levels: 1 to 127. The unit is searched as the largest magnitude / k, k = levels ... 1: whatever defense made the
    tensor, nothing but the update has to be known.
    """

    levels: int

    @property
    def name(self) -> str:
        """With the number of levels."""
        return f"codes{self.levels}"

    @property
    def width(self) -> int:
        """Bits per entry."""
        return (2 * self.levels).bit_length()

    def pack(self, row: Tensor, sizes: Sequence[int]) -> Small:
        """The codes (uint8, from 0) and the units. NaN and infinity have no code."""
        units, likely = self._units(row, sizes)
        while True:
            # the first that may still be one; those of tensors that are exact stay what they are
            chosen = units.gather(1, likely.int().argmax(1, keepdim=True))[:, 0]
            entries = (self._codes(row, _spread(chosen, sizes)) + self.levels).to(torch.uint8)
            exact = _same(self.unpack(entries, chosen, sizes, row.dtype), row, sizes) & likely.any(1)
            wrong = likely.any(1) & ~exact
            if not wrong.any():
                return Small(entries, chosen, exact)
            first = likely.int().cumsum(1) == 1
            likely = likely & ~(first & likely & wrong[:, None])

    def unpack(self, entries: Tensor, units: Tensor, sizes: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Codes times units."""
        return (entries.to(dtype) - self.levels) * _spread(units, sizes)

    def to_bytes(self, entries: Tensor) -> Tensor:
        """``width`` bits of each."""
        if self.width == 8:
            return entries
        places = torch.arange(self.width, dtype=torch.uint8, device=entries.device)
        return packed_bits((entries[:, None] >> places) & 1)

    def from_bytes(self, packed: Tensor, num_entries: int) -> Tensor:
        """The codes."""
        if self.width == 8:
            return packed[:num_entries]
        bits = unpacked_bits(packed, num_entries * self.width)
        planes = bits[: len(bits) // self.width * self.width].view(-1, self.width)
        weights = 2 ** torch.arange(self.width, dtype=torch.uint8, device=packed.device)
        return (planes * weights).sum(1, dtype=torch.uint8)

    def _codes(self, entries: Tensor, unit: Tensor) -> Tensor:
        # adding 0 turns -0.0 into 0.0: a code has no sign of zero
        return (entries / unit).round().clamp(-self.levels, self.levels) + 0.0

    def _units(self, row: Tensor, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
        """What may be the tensors' units [tensors, levels], and which of them fit the smallest entry, the largest and
        some others; another look at all of them decides."""
        magnitudes = row.abs()
        largest = _of_each(magnitudes, sizes, torch.amax)
        smallest = _of_each(torch.where(magnitudes > 0, magnitudes, torch.inf), sizes, torch.amin)
        # a tensor of zeros has any unit
        ends = torch.where(largest == 0, 0, torch.stack([smallest, largest])).T
        largest = torch.where(largest == 0, self.levels, largest)
        units = largest[:, None] / torch.arange(self.levels, 0, -1, device=row.device)
        last = torch.tensor(sizes, device=row.device)[:, None] - 1
        some = torch.arange(_PROBE, device=row.device).minimum(last) + _starts(sizes, row.device)[:, None]
        probe = torch.cat([row[some], ends], 1)[:, None]
        fits = (self._codes(probe, units[..., None]) * units[..., None] == probe).all(2)
        return units, fits & (units > 0)


@final
@dataclass(frozen=True)
class Signs:
    """Entries of one magnitude: a bit each, and each tensor's magnitude."""

    name: str = "signs"
    width: int = 1

    def pack(self, row: Tensor, sizes: Sequence[int]) -> Small:
        """Which are negative, and the magnitudes."""
        magnitudes = row[_starts(sizes, row.device)].abs()
        negative = row.signbit()
        return Small(negative, magnitudes, _same(self.unpack(negative, magnitudes, sizes, row.dtype), row, sizes))

    def unpack(self, entries: Tensor, units: Tensor, sizes: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Plus or minus the magnitude."""
        magnitudes = _spread(units, sizes)
        return torch.where(entries, -magnitudes, magnitudes)

    def to_bytes(self, entries: Tensor) -> Tensor:
        """Eight in a byte."""
        return packed_bits(entries)

    def from_bytes(self, packed: Tensor, num_entries: int) -> Tensor:
        """The bits."""
        return unpacked_bits(packed, num_entries)


def _starts(sizes: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(list(accumulate(sizes[:-1], initial=0)), dtype=torch.long, device=device)


def _spread(units: Tensor, sizes: Sequence[int]) -> Tensor:
    """Each tensor's unit, for each of its entries."""
    return units.repeat_interleave(torch.tensor(sizes, dtype=torch.long, device=units.device), output_size=sum(sizes))


def _of_each(row: Tensor, sizes: Sequence[int], extreme: Callable[[Tensor], Tensor]) -> Tensor:
    return torch.stack([extreme(part) for part in row.split_with_sizes(list(sizes))])


def _same(a: Tensor, b: Tensor, sizes: Sequence[int]) -> Tensor:
    """Whether all bits of a tensor are the same, bool [tensors]."""
    return ~_of_each(bits_of(a) != bits_of(b), sizes, torch.any)
