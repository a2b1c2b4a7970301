"""The codec of updates whose tensors hold fewer bits than their dtype: tensor by tensor the small form, where exact."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import NamedTuple, Protocol, final

import torch
from torch import Tensor

from gia_bench.errors import WireError
from gia_bench.rows import joined
from gia_bench.values import Params, Payload, Shared, Update
from gia_bench.wire.codec import names_by_dtype


class Small(NamedTuple):
    """Some tensors in one row. entries: the small form [n]; units: what each tensor needs beside them, [tensors], or
    [0] for nothing; exact: whether that is all of a tensor, bool [tensors]."""

    entries: Tensor
    units: Tensor
    exact: Tensor


class Packing(Protocol):
    """A small form of tensors, computed for all in one row: a step for each takes longer than its entries."""

    @property
    def name(self) -> str:
        """What a payload is called."""
        ...

    @property
    def width(self) -> int:
        """Bits per entry."""
        ...

    def pack(self, row: Tensor, sizes: Sequence[int]) -> Small:
        """The small form of tensors with ``sizes`` entries (at least one) each."""
        ...

    def unpack(self, entries: Tensor, units: Tensor, sizes: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The row as it was."""
        ...

    def to_bytes(self, entries: Tensor) -> Tensor:
        """Entries as they travel."""
        ...

    def from_bytes(self, packed: Tensor, num_entries: int) -> Tensor:
        """The inverse of ``to_bytes``."""
        ...


@final
@dataclass(frozen=True)
class Narrow:
    """A tensor that the packing holds exactly travels packed, any other one as it is.

    The way out is needed: the mean of many clients' packed updates is not packed itself, and defenses can be chained.
    ``payload.tensors``: header uint8 [tensors] (1 packed, 0 dense); then for every dtype the packed entries in one row,
    their units, and the dense entries in one row. Tensors stand by dtype, then by name; empty ones do not travel.
    """

    packing: Packing

    def encode(self, update: Update, shared: Shared, num_examples: int) -> Payload:
        """The smallest exact form of every tensor."""
        header: list[bool] = []
        parts: list[Tensor] = []
        for dtype, names in _groups(update).items():
            row, sizes = joined(update, names).detach(), [update[name].numel() for name in names]
            entries, units, exact = self.packing.pack(row, sizes)
            each = units.element_size() if units.numel() else 0
            # a unit can cost more than it saves on a tensor of one entry
            saves = [self.packing.width * n / 8 + each < dtype.itemsize * n for n in sizes]
            small = [bool(e) and s for e, s in zip(exact.tolist(), saves, strict=True)]
            header += small
            own = units[torch.tensor(small, device=units.device)] if units.numel() else units
            parts += (
                self.packing.to_bytes(_those(entries, sizes, small)),
                own,
                _those(row, sizes, [not s for s in small]),
            )
        device = parts[0].device if parts else torch.device("cpu")
        return Payload(self.packing.name, (torch.tensor(header, dtype=torch.uint8).to(device), *parts), num_examples)

    def decode(self, payload: Payload, like: Params, shared: Shared) -> Update:
        """The update as it was. Raises ``WireError`` where the payload does not fit ``like``."""
        groups = _groups(like)
        head, *parts = payload.tensors
        count = sum(len(names) for names in groups.values())
        if payload.codec != self.packing.name or head.numel() != count or len(parts) != 3 * len(groups):
            raise WireError(
                f"A {payload.codec} payload holds {head.numel()} tensors in {len(parts)} parts; {self.packing.name} "
                f"expects {count} tensors in {3 * len(groups)}: decode it with the codec and the model of its encoder."
            )
        update: Update = {}
        small = head.bool().tolist()
        for dtype, names in groups.items():
            (packed, units, dense), parts = parts[:3], parts[3:]
            own, small = small[: len(names)], small[len(names) :]
            sizes = [like[name].numel() for name in names]
            few, many = list(compress(sizes, own)), [n for n, s in zip(sizes, own, strict=True) if not s]
            needed = math.ceil(sum(few) * self.packing.width / 8)
            if packed.nbytes != needed or dense.numel() != sum(many) or dense.dtype != dtype:
                raise WireError(
                    f"A {payload.codec} payload holds {packed.nbytes} packed bytes and {dense.numel()} {dense.dtype} "
                    f"entries, but the model needs {needed} and {sum(many)} of {dtype}; encode updates of the "
                    "parameters' shapes and dtypes."
                )
            entries = self.packing.from_bytes(packed, sum(few))
            wide = iter(self.packing.unpack(entries, units, few, dtype).split_with_sizes(few))
            plain = iter(dense.split_with_sizes(many))
            update |= {n: next(wide if s else plain).view(like[n].shape) for n, s in zip(names, own, strict=True)}
        return {name: update.get(name, param.detach().clone()) for name, param in like.items()}


def _groups(tensors: Mapping[str, Tensor]) -> dict[torch.dtype, list[str]]:
    return names_by_dtype({name: t for name, t in tensors.items() if t.numel()})


def _those(row: Tensor, sizes: Sequence[int], wanted: Sequence[bool]) -> Tensor:
    if all(wanted):
        return row
    return torch.cat([row[:0], *compress(row.split_with_sizes(list(sizes)), wanted)])
