"""The codec of updates whose tensors hold fewer bits than their dtype: tensor by tensor the small form, where exact."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, final

import torch
from torch import Tensor

from gia_bench.errors import WireError
from gia_bench.values import Params, Payload, Shared, Update


class Packing(Protocol):
    """A small form of one tensor's entries."""

    @property
    def name(self) -> str:
        """What a payload is called."""
        ...

    @property
    def num_parts(self) -> int:
        """How many tensors ``pack`` gives."""
        ...

    def pack(self, row: Tensor) -> tuple[Tensor, ...] | None:
        """The small form of the entries [n], or None where it would lose a bit."""
        ...

    def unpack(self, parts: tuple[Tensor, ...], num_entries: int, dtype: torch.dtype) -> Tensor:
        """The entries [n] as they were."""
        ...


@final
@dataclass(frozen=True)
class Narrow:
    """A tensor that the packing holds exactly travels packed, any other one as it is.

    The way out is needed: the mean of many clients' packed updates is not packed itself, and defenses can be chained.
    ``payload.tensors``: header uint8 [tensors] (1 packed, 0 dense), then every tensor's parts by sorted names.
    """

    packing: Packing

    def encode(self, update: Update, shared: Shared, num_examples: int) -> Payload:
        """The smallest exact form of every tensor."""
        header: list[bool] = []
        parts: list[Tensor] = []
        for name in sorted(update):
            row = update[name].detach().reshape(-1)
            packed = self.packing.pack(row)
            # a code book can cost more than it saves on a tensor of one entry
            small = packed is not None and sum(p.nbytes for p in packed) < row.nbytes
            header.append(small)
            parts += packed if packed is not None and small else (row,)
        device = parts[0].device if parts else torch.device("cpu")
        head = torch.tensor(header, dtype=torch.uint8, device=device)
        return Payload(self.packing.name, (head, *parts), num_examples)

    def decode(self, payload: Payload, like: Params, shared: Shared) -> Update:
        """The update as it was. Raises ``WireError`` where the payload does not fit ``like``."""
        head, *parts = payload.tensors
        counts = [self.packing.num_parts if small else 1 for small in head.tolist()]
        if payload.codec != self.packing.name or len(counts) != len(like) or sum(counts) != len(parts):
            raise WireError(
                f"A {payload.codec} payload holds {len(counts)} tensors in {len(parts)} parts; {self.packing.name} "
                f"expects {len(like)} tensors in {sum(counts)}: decode it with the codec and the model of its encoder."
            )
        update: Update = {}
        for name, small, count in zip(sorted(like), head.tolist(), counts, strict=True):
            own, parts = tuple(parts[:count]), parts[count:]
            param = like[name]
            row = self.packing.unpack(own, param.numel(), param.dtype) if small else own[0]
            if row.numel() != param.numel() or row.dtype != param.dtype:
                raise WireError(
                    f"A {payload.codec} payload holds {row.dtype} [{row.numel()}] for {name!r}, but the model has "
                    f"{param.dtype} {list(param.shape)}; encode updates of the parameters' shapes and dtypes."
                )
            update[name] = row.view(param.shape)
        return {name: update[name] for name in like}
