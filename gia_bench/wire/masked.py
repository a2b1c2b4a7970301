"""What masked clients send: fixed-point numbers in the ring of integers modulo 2^bits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple, final

import torch
from torch import Tensor

from gia_bench.errors import ConfigError, WireError
from gia_bench.values import Buffers, Update
from gia_bench.wire.codec import placed

WIDTHS = {16: torch.int16, 32: torch.int32}
"""Bits of a ring element -> the dtype of a payload."""


@final
class Ring:
    """Integers modulo 2^bits. Computed in int64; on the wire one element takes bits / 8 bytes."""

    def __init__(self, bits: int) -> None:
        self.bits, self.size, self.half = bits, 1 << bits, 1 << (bits - 1)

    def wrapped(self, row: Tensor) -> Tensor:
        """The same elements as numbers in [-2^(bits-1), 2^(bits-1)), int64."""
        return ((row + self.half) & (self.size - 1)) - self.half

    def packed(self, row: Tensor) -> Tensor:
        """The same elements as they travel."""
        return self.wrapped(row).to(WIDTHS[self.bits])


class _Part(NamedTuple):
    """One tensor's stretch of the row. places: where it has values, None for everywhere; origin: what is subtracted
    before it is sent; steps: ring steps in one unit, 1 for whole numbers; limit: the largest magnitude that fits;
    setting: what to raise for more.
    """

    name: str
    like: Tensor
    places: Tensor | None
    origin: Tensor | None
    steps: float
    limit: float
    setting: str

    @property
    def length(self) -> int:
        return self.like.numel() if self.places is None else int(self.places.count_nonzero())


@final
class Layout:
    """How one client's update, with the evidence beside it, its buffers and its weight lie in one row of ring elements.

    Every number is multiplied by the client's weight w_i and rounded to a multiple of 1 / steps, a power of two such
    that no sum over the cohort can wrap: sum_i w_i (limit * steps + 1) < 2^(bits-1). Whole numbers (BatchNorm's
    counter) and booleans stay exact. Buffers are sent as their change since the broadcast, which is small. Where
    ``places`` (by name, bool) are known to all only the values there are sent; nothing else is sparse behind a mask.

    clip, buffer_clip: the limits of an update and of a buffer's change; total_weight: W, the sum over the cohort.
    Raises ``ConfigError`` where the ring has no room for W.
    """

    def __init__(
        self,
        ring: Ring,
        like: Mapping[str, Tensor],
        buffers: Buffers,
        places: Mapping[str, Tensor],
        *,
        total_weight: int,
        clip: float,
        buffer_clip: float,
    ) -> None:
        self.ring, self.total_weight = ring, total_weight
        self.update = [self._part(k, like[k], places.get(k), None, clip, "clip") for k in like]
        self.buffers = [self._part(k, buffers[k], None, buffers[k], buffer_clip, "buffer_clip") for k in buffers]
        self.lengths = [p.length for p in (*self.update, *self.buffers)]
        self.length = sum(self.lengths) + 1

    def _part(
        self, name: str, like: Tensor, places: Tensor | None, origin: Tensor | None, clip: float, setting: str
    ) -> _Part:
        most = (self.ring.half - 1) // self.total_weight
        if most < 2:
            raise ConfigError(
                f"aggregation.bits={self.ring.bits}: weights that sum to {self.total_weight} leave no room for values; "
                "raise aggregation.bits, or set fl.weighting=uniform."
            )
        if not like.is_floating_point():
            return _Part(name, like, places, origin, 1.0, most, "bits")
        # the largest power of two: multiplying by it and dividing by it round nothing
        steps = 2.0 ** (math.frexp((most - 1) / clip)[1] - 1)
        return _Part(name, like, places, origin, steps, clip, setting)

    def row(self, sent: Update, buffers: Buffers, weight: int, who: str) -> Tensor:
        """One client's ring elements [length] int64, before they are masked. who: the client and the round, for
        messages. Raises ``WireError`` for a value that does not fit, or lies where none is known to be."""
        values = []
        for tensors, parts in ((sent, self.update), (buffers, self.buffers)):
            for part in parts:
                value = tensors[part.name].detach().double()
                if part.places is not None:
                    if value.masked_fill(part.places, 0).any():
                        raise WireError(f"{who} has values off the announced mask in {part.name!r}.")
                    value = value[part.places]
                values.append(value.reshape(-1) if part.origin is None else (value - part.origin.double()).reshape(-1))
        self._check(values, who)
        rounded = [
            (v * weight * p.steps).round().long() for v, p in zip(values, (*self.update, *self.buffers), strict=True)
        ]
        return torch.cat([*rounded, torch.tensor([weight], device=values[0].device)])

    def _check(self, values: list[Tensor], who: str) -> None:
        # read once: reading each would wait for the device once per tensor
        worst = torch.stack([v.abs().max() if v.numel() else v.new_zeros(()) for v in values]).tolist()
        for value, part in zip(worst, (*self.update, *self.buffers), strict=True):
            if not value <= part.limit:
                raise WireError(
                    f"{who} has {value:.4g} in {part.name!r}, but up to {part.limit:g} fits the ring of masked sums; "
                    f"raise aggregation.{part.setting}, or make updates smaller (defense=clip, a lower learning rate)."
                )

    def opened(self, total: Tensor) -> tuple[Update, Buffers]:
        """The weighted means of a sum [length] that carries no mask any more. Of booleans: the share that is true."""
        row = self.ring.wrapped(total)
        weight = int(row[-1])
        parts = row[:-1].split_with_sizes(self.lengths)
        own = [
            _mean(part, values.double() / (part.steps * weight))
            for part, values in zip((*self.update, *self.buffers), parts, strict=True)
        ]
        names = [p.name for p in self.update]
        update = dict(zip(names, own, strict=False))
        return update, dict(zip([p.name for p in self.buffers], own[len(names) :], strict=True))


def _mean(part: _Part, values: Tensor) -> Tensor:
    like = part.like.double()
    if part.places is not None:
        values = placed(values, part.places.reshape(-1), {part.name: like}, [part.name])[part.name]
    values = values.view(like.shape)
    if part.like.dtype == torch.bool:
        return values
    if not part.like.is_floating_point():
        values = values.round()
    return (values if part.origin is None else part.origin.double() + values).to(part.like.dtype)
