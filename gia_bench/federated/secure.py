"""Secure aggregation, simulated: pairwise masks that cancel in the sum."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from gia_bench.defenses.checks import check
from gia_bench.errors import ConfigError, NonFiniteError, choices
from gia_bench.federated.aggregation import Gathering, Meeting, Received
from gia_bench.federated.ranks import Ranks
from gia_bench.seeding import stream
from gia_bench.values import Buffers, Payload, Update
from gia_bench.wire import Layout, Ring, places
from gia_bench.wire.masked import WIDTHS

KEYS, SEALED, SHARE, TOTAL_WEIGHT = 64, 80, 32, 8
"""Bytes of the messages around the masked sum (gia_bench choice: 32-byte keys, seeds and shares, 16-byte tags): a
client's two public keys; the sealed shares of its key and of its own seed for one other client; one share given to the
server when the masks are removed; the sum of the weights, from which the fixed point follows."""

_BLOCK = 1 << 20


@final
@dataclass(frozen=True, kw_only=True)
class Secure:
    """The server learns the weighted mean over the clients that stayed, and of each client uniform ring elements.

    Client i sends w_i u_i and w_i in fixed point, modulo 2^bits, plus the sum over the others j of the round of
    +-PRG(seed_ij), + where i < j: in the sum over all the masks cancel (Bonawitz et al., CCS 2017). Where clients are
    gone the server gets the seeds they shared with those who stayed, and subtracts what did not cancel. The time is
    that of K - 1 masks per client.

    Simulated are numbers and bytes, and no cryptography: seeds come from the run's seed, the generator is not a
    cryptographic one, and key agreement, secret sharing and the paper's second mask (against a server that calls late
    clients gone) only take their bytes. A codec saves nothing behind a mask: every coordinate takes bits / 8 bytes,
    unless all know the places of values (ADGP's announced mask, a pruning mask).

    bits: 16 | 32, of one ring element; clip: the largest magnitude in an update, > 0; with the cohort's total weight it
    gives the step of the fixed point, the finest at which no sum can wrap (see ``Layout``); buffer_clip: the same
    for what local work changes in BatchNorm's statistics; dropout: the share of clients, in [0, 1), that vanish once
    masks are agreed upon, rounded to whole clients, drawn each round; they keep their states as they were;
    threshold: the least number of clients whose sum may be opened, at least 2.
    """

    bits: int = 32
    clip: float = 8.0
    buffer_clip: float = 1024.0
    dropout: float = 0.0
    threshold: int = 2

    def __post_init__(self) -> None:
        if self.bits not in WIDTHS:
            raise ConfigError(choices("aggregation.bits", self.bits, WIDTHS))
        for name in ("clip", "buffer_clip"):
            check(f"aggregation.{name}", getattr(self, name), lambda v: 0 < v < math.inf, "be a finite number above 0")
        check("aggregation.dropout", self.dropout, lambda v: 0 <= v < 1, "be in [0, 1)")
        check("aggregation.threshold", self.threshold, lambda v: v >= 2 and v == int(v), "be a whole number from 2 on")

    @property
    def hides_clients(self) -> bool:
        """Yes."""
        return True

    def begin(self, meeting: Meeting) -> Gathering:
        """A sum without any payload. Raises ``ConfigError`` where too few clients stay."""
        num_clients = len(meeting.clients)
        num_gone = round(self.dropout * num_clients)
        if num_clients - num_gone < self.threshold:
            raise ConfigError(
                f"Round {meeting.round_index}: {num_gone} of {num_clients} clients vanish, so fewer than "
                f"aggregation.threshold={self.threshold} are left to hide among; raise fl.clients_per_round, or lower "
                "aggregation.dropout."
            )
        order = torch.randperm(num_clients, generator=stream(meeting.seed, "vanished", meeting.round_index))
        vanished = frozenset(meeting.clients[m] for m in order[:num_gone].tolist())
        ring = Ring(self.bits)
        layout = Layout(
            ring, meeting.like, meeting.buffers, places(meeting.codec, meeting.like, meeting.shared),
            total_weight=sum(meeting.weights), clip=self.clip, buffer_clip=self.buffer_clip,
        )  # fmt: skip
        return _Masked(meeting, vanished, ring, layout, self.threshold)

    def downlink_bytes(self, num_clients: int) -> int:
        """The others' keys and sealed shares, and the total weight."""
        return (num_clients - 1) * (KEYS + SEALED) + TOTAL_WEIGHT


@final
class _Masked:
    def __init__(self, meeting: Meeting, vanished: frozenset[int], ring: Ring, layout: Layout, threshold: int) -> None:
        self.meeting, self.vanished, self.ring, self.layout = meeting, vanished, ring, layout
        self.threshold = threshold
        self.device = next(iter(meeting.like.values())).device
        self.total = torch.zeros(layout.length, dtype=torch.int64, device=self.device)

    def receive(self, member: int, num_examples: int, sent: Update, buffers: Buffers) -> Received:
        meeting, client = self.meeting, self.meeting.clients[member]
        who = f"Client {client} in round {meeting.round_index}"
        row = self.layout.row(sent, buffers, meeting.weights[member], who)
        masked = self.ring.packed(row + self._mask(client, meeting.clients))
        self.total = self.ring.wrapped(self.total + masked)
        others = len(meeting.clients) - 1
        around = KEYS + others * (SEALED + SHARE) + TOTAL_WEIGHT
        # the number of examples is hidden as well: the weight is one of the masked elements
        return Received(Payload("masked", (masked,), 0), None, masked.nbytes + around)

    def means(self, gone: Collection[int], ranks: Ranks) -> tuple[Update, Buffers]:
        meeting = self.meeting
        stayed = [c for c in meeting.clients if c not in gone]
        if len(stayed) < self.threshold:
            raise NonFiniteError(
                f"Round {meeting.round_index}: only {len(stayed)} of {len(meeting.clients)} clients sent a finite "
                f"update, and aggregation.threshold={self.threshold}: a sum of fewer is not opened."
            )
        total = ranks.sum(self.total)
        for client in stayed if gone else ():
            total = self.ring.wrapped(total - self._mask(client, gone))
        return self.layout.opened(total)

    def _mask(self, client: int, others: Iterable[int]) -> Tensor:
        """The sum of what ``client`` adds for ``others``, int64 [length]; a block at a time, so that one mask's memory
        is all it takes."""
        meeting = self.meeting
        mask = torch.zeros(self.layout.length, dtype=torch.int64)
        for other in others:
            if other != client:
                first, second = min(client, other), max(client, other)
                pair = stream(meeting.seed, "pairwise", meeting.round_index, first, second)
                for start in range(0, len(mask), _BLOCK):
                    block = mask[start : start + _BLOCK]
                    drawn = torch.randint(self.ring.size, block.shape, generator=pair)
                    block.add_(drawn, alpha=1 if client == first else -1)
        return mask.to(self.device)
