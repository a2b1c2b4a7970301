"""The ranks of a distributed run: each plays its share of the cohort, then sums and states are exchanged."""

from __future__ import annotations

from typing import Any, Protocol, TypeVar, final

import torch.distributed
from torch import Tensor

T = TypeVar("T")


class Ranks(Protocol):
    """``index`` of ``count`` processes."""

    @property
    def index(self) -> int: ...
    @property
    def count(self) -> int: ...

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, on every rank."""
        ...

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in the order of ranks, on every rank."""
        ...


@final
class Alone:
    """A single process."""

    index, count = 0, 1

    def sum(self, tensor: Tensor) -> Tensor:
        """Itself."""
        return tensor

    def gather(self, value: T) -> list[T]:
        """Its own value."""
        return [value]


@final
class Distributed:
    """``torch.distributed``, as Lightning's strategy has set it up."""

    def __init__(self) -> None:
        self.index = torch.distributed.get_rank()
        self.count = torch.distributed.get_world_size()

    def sum(self, tensor: Tensor) -> Tensor:
        """All-reduce of a copy."""
        total = tensor.clone()
        torch.distributed.all_reduce(total)
        return total

    def gather(self, value: T) -> list[T]:
        """All-gather of any picklable value."""
        values: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(values, value)
        return values


def current_ranks() -> Ranks:
    """``Distributed`` where a process group has been set up, else ``Alone``."""
    ready = torch.distributed.is_available() and torch.distributed.is_initialized()
    return Distributed() if ready else Alone()
