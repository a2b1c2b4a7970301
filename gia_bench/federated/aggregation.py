"""How the updates of a round become their weighted mean, and what of each client the server sees on the way."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol, final

import torch
from torch import Tensor

from gia_bench.federated.ranks import Ranks
from gia_bench.values import Buffers, Payload, Shared, Update
from gia_bench.wire import Codec


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class Meeting:
    """The clients that start a round, and what all of them know of it.

    weights: what each one's update counts; like: names, shapes and dtypes of what ``protect`` sends (update and
    evidence); buffers: as broadcast; shared: the announcement; codec: the defense's.
    """

    seed: int
    round_index: int
    clients: tuple[int, ...]
    weights: tuple[int, ...]
    like: dict[str, Tensor]
    buffers: Buffers
    shared: Shared
    codec: Codec


class Received(NamedTuple):
    """What one client has sent. update: as decoded, None where it cannot be read alone; num_bytes: everything it sent,
    buffers included."""

    payload: Payload
    update: Update | None
    num_bytes: int


class Gathering(Protocol):
    """The server's side of one round. Memory does not grow with the cohort."""

    @property
    def vanished(self) -> frozenset[int]:
        """Clients that will send nothing, although they met."""
        ...

    def receive(self, member: int, num_examples: int, sent: Update, buffers: Buffers) -> Received:
        """Adds what the client at position ``member`` sends: its protected update and its buffers, both finite."""
        ...

    def means(self, gone: Collection[int], ranks: Ranks) -> tuple[Update, Buffers]:
        """The weighted means over all that sent; ``gone``: the clients that did not, whatever the reason."""
        ...


class Aggregation(Protocol):
    """A protocol between clients and server."""

    @property
    def hides_clients(self) -> bool:
        """Whether a client's update cannot be read alone."""
        ...

    def begin(self, meeting: Meeting) -> Gathering:
        """One round."""
        ...

    def downlink_bytes(self, num_clients: int) -> int:
        """What a client of a round of so many downloads for the protocol itself."""
        ...


@final
@dataclass(frozen=True)
class Plain:
    """Every client sends its update as its defense packs it, and its buffers as they are."""

    @property
    def hides_clients(self) -> bool:
        """No."""
        return False

    def begin(self, meeting: Meeting) -> Gathering:
        """Empty sums."""
        return _Open(meeting)

    def downlink_bytes(self, num_clients: int) -> int:
        """None."""
        return 0


@final
class _Open:
    vanished: frozenset[int] = frozenset()

    def __init__(self, meeting: Meeting) -> None:
        self.meeting = meeting
        self.update, self.buffers = _Sum(), _Sum()

    def receive(self, member: int, num_examples: int, sent: Update, buffers: Buffers) -> Received:
        meeting, weight = self.meeting, self.meeting.weights[member]
        payload = meeting.codec.encode(sent, meeting.shared, num_examples)
        decoded = meeting.codec.decode(payload, meeting.like, meeting.shared)
        self.update.add(decoded, weight)
        self.buffers.add(buffers, weight)
        return Received(payload, decoded, payload.num_bytes + sum(b.nbytes for b in buffers.values()))

    def means(self, gone: Collection[int], ranks: Ranks) -> tuple[Update, Buffers]:
        meeting = self.meeting
        weight = sum(w for c, w in zip(meeting.clients, meeting.weights, strict=True) if c not in gone)
        return self.update.mean(weight, meeting.like, ranks), self.buffers.mean(weight, meeting.buffers, ranks)


class _Sum:
    """A running weighted sum."""

    def __init__(self) -> None:
        self.total: dict[str, Tensor] = {}

    def add(self, tensors: Mapping[str, Tensor], weight: int) -> None:
        for name, tensor in tensors.items():
            if name not in self.total:
                self.total[name] = torch.zeros_like(tensor, dtype=_summable(tensor.dtype))
            self.total[name].add_(tensor.to(self.total[name].dtype), alpha=weight)

    def mean(self, weight: int, like: Mapping[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
        mean = {}
        for k, v in like.items():
            own = self.total.get(k)  # absent on a rank without a client
            total = ranks.sum(torch.zeros_like(v, dtype=_summable(v.dtype)) if own is None else own) / weight
            if v.dtype == torch.bool:
                mean[k] = total  # the share that is true
            else:
                mean[k] = (total if v.is_floating_point() else total.round()).to(v.dtype)
        return mean


def _summable(dtype: torch.dtype) -> torch.dtype:
    # integer buffers (BatchNorm's counter) are averaged exactly; halves would overflow
    return dtype if dtype in (torch.float32, torch.float64) else torch.float64
