"""The values that travel from a client's images to a record, and nothing that acts on them.

Shape letters: K clients, S local steps, B batch, V victims, T restarts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeAlias

from torch import Tensor

if TYPE_CHECKING:
    from gia_bench.defenses.base import Defense
    from gia_bench.federated.work import LocalWork

Params: TypeAlias = dict[str, Tensor]
"""Trainable tensors by name."""
Buffers: TypeAlias = dict[str, Tensor]
"""A model's untrained tensors by name (BatchNorm statistics)."""
Update: TypeAlias = dict[str, Tensor]
"""What a server step subtracts, by parameter name: the gradient (FedSGD), or server - client weights (FedAvg)."""
Shared: TypeAlias = dict[str, Tensor]
"""What a defense adds to the broadcast of a round, the same for all clients; empty for most."""
State: TypeAlias = dict[str, Tensor]
"""What a defense remembers between rounds, flat and by name, so that it can be stacked, stored and resumed."""
Noise: TypeAlias = dict[str, Tensor]
"""Every random number one client's defense uses in one round, drawn before the work starts."""


class Examples(Protocol):
    """Labelled images, gathered when asked for: ``labels`` [N] int64."""

    @property
    def labels(self) -> Tensor: ...

    def __len__(self) -> int: ...

    def images(self, indices: Tensor) -> Tensor:
        """Images [n, C, H, W], float32 in [0, 1], for ``indices`` [n] int64."""
        ...


class Batch(NamedTuple):
    """Images, labels and which of them are real. A NamedTuple, because it crosses ``vmap``.

    inputs: [..., B, C, H, W] float in [0, 1]; labels: [..., B] int64 classes, or [..., B, classes] probabilities;
    mask: [..., B] float, 1 for an example and 0 for padding.
    """

    inputs: Tensor
    labels: Tensor
    mask: Tensor


@dataclass(frozen=True, eq=False)
class Payload:
    """What one client puts on the wire: tensors as packed, headers included."""

    codec: str
    tensors: tuple[Tensor, ...]
    num_examples: int

    @property
    def num_bytes(self) -> int:
        """Measured on what was packed."""
        return sum(t.nbytes for t in self.tensors)


@dataclass(frozen=True, eq=False)
class Transcript:
    """What crossed the wire in one round. ``payloads``, ``updates`` and ``sent_buffers`` hold only observed clients.

    params, buffers, shared: the broadcast; updates: decoded payloads by client; sent_buffers: the BatchNorm
    statistics those clients sent back; aggregate: the weighted mean of the decoded updates of ``clients``;
    num_examples: the distinct examples behind all of them together; evidence: what those clients told the server
    beside their updates (``Defense.asks``), which no threat model shows yet; own_params: by client, where a malicious
    server sent those clients each its own values (``params`` is then their mean over all clients). Behind the masks of
    secure aggregation only payloads and the aggregate are left of all this: nothing else of one client can be read.
    """

    round_index: int
    params: Params
    buffers: Buffers
    shared: Shared
    payloads: Mapping[int, Payload]
    updates: Mapping[int, Update]
    sent_buffers: Mapping[int, Buffers]
    aggregate: Update
    clients: tuple[int, ...]
    num_examples: int
    evidence: Mapping[int, Mapping[str, Tensor]] = field(default_factory=dict)
    own_params: Mapping[int, Params] = field(default_factory=dict)


@dataclass(frozen=True, eq=False, kw_only=True)
class Observation:
    """What an attacker holds about one update. ``None`` and empty mean: the threat model does not show it.

    params, buffers: the model the client started from; update: by parameter name, as the server decoded it;
    shared: the defense's announcement; labels: [B] int64; num_examples: B; local: the local work (FedAvg's steps
    and learning rate); defense: its public hyperparameters, for attackers who know the defense; sent_buffers:
    the statistics that the client sent back; public: examples of the same kind that no client holds; num_clients:
    the updates of how many were averaged, 1 for a client's own; earlier: the same client in earlier attacked rounds;
    unseen: in how many rounds before it took part that are not among them.
    """

    params: Params
    update: Update
    buffers: Buffers = field(default_factory=dict)
    shared: Shared = field(default_factory=dict)
    labels: Tensor | None = None
    num_examples: int | None = None
    local: LocalWork | None = None
    defense: Defense | None = None
    sent_buffers: Buffers | None = None
    public: Examples | None = None
    num_clients: int = 1
    earlier: tuple[Observation, ...] = ()
    unseen: int = 0

    @property
    def unit(self) -> float:
        """What a gradient that stays the same from step to step is multiplied with in this update: 1 for FedSGD; for
        FedAvg the learning rate times the number of local steps; of Poisson batches also the examples over those
        expected. Of an aggregate: for a client with the mean number of examples."""
        return 1.0 if self.local is None else self.local.scale(self.examples_each)

    @property
    def examples_each(self) -> int:
        """The examples of one client, on average over an aggregate; 1 where their number is not shown."""
        return max(round((self.num_examples or 1) / self.num_clients), 1)


@dataclass(frozen=True, eq=False, kw_only=True)
class Reconstruction:
    """What an attack believes the client's images were.

    inputs: [B, C, H, W] in [0, 1] (not clamped); labels: [B] int64 or None; score: lower is better, computed from
    what the attacker sees and never from the truth; failure: why there is nothing, or None; diverged: how many restarts
    left the numbers, after which their best iterate counts (None: nothing is iterated); alternatives: all that an
    ensemble had to choose from, by name, the chosen one included.
    """

    inputs: Tensor
    labels: Tensor | None
    score: float
    failure: str | None = None
    diverged: int | None = None
    alternatives: Mapping[str, Reconstruction] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Truth:
    """The private images behind one observation: inputs [B, C, H, W] in [0, 1], labels [B] int64."""

    inputs: Tensor
    labels: Tensor
