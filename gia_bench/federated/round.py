"""One federated round as a function of the server's state, the clients' states and the cohort."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gia_bench.data.cohort import Cohort
from gia_bench.errors import NonFiniteError
from gia_bench.federated.clients import Clients
from gia_bench.federated.ranks import Alone, Ranks
from gia_bench.federated.rules import Rules, Server
from gia_bench.values import Buffers, Payload, Shared, State, Transcript, Update


@dataclass(frozen=True, eq=False, kw_only=True)
class Round:
    """What a round leaves behind. aggregate: the compensated weighted mean, for the server's optimizer; states: of the
    clients that played; led: whether a client (and not the server) made the announcement ``shared``; uplink_bytes: per
    client, as packed; aggregate_bytes: what ``aggregate`` takes on the way down; dropped: clients whose updates were
    not finite; transcript: None where nobody was observed.
    """

    aggregate: Update
    buffers: Buffers
    server_state: State
    states: Mapping[int, State]
    shared: Shared
    led: bool
    uplink_bytes: Mapping[int, int]
    aggregate_bytes: int
    loss: float
    dropped: tuple[int, ...]
    transcript: Transcript | None


@dataclass
class _Share:
    """What one rank's clients leave behind, besides the sums."""

    states: dict[int, State] = field(default_factory=dict)
    uplink: dict[int, int] = field(default_factory=dict)
    dropped: list[int] = field(default_factory=list)
    payloads: dict[int, Payload] = field(default_factory=dict)
    updates: dict[int, Update] = field(default_factory=dict)
    sent_buffers: dict[int, Buffers] = field(default_factory=dict)
    loss: float = 0.0
    weight: float = 0.0

    def add(self, other: _Share) -> None:
        self.states |= other.states
        self.uplink |= other.uplink
        self.dropped += other.dropped
        self.payloads |= other.payloads
        self.updates |= other.updates
        self.sent_buffers |= other.sent_buffers
        self.loss += other.loss
        self.weight += other.weight


class _Sum:
    """A running weighted sum, so that memory does not grow with the cohort."""

    def __init__(self) -> None:
        self.total: dict[str, Tensor] = {}

    def add(self, tensors: Mapping[str, Tensor], weight: float) -> None:
        for name, tensor in tensors.items():
            if name not in self.total:
                self.total[name] = torch.zeros_like(tensor, dtype=_summable(tensor.dtype))
            self.total[name].add_(tensor.to(self.total[name].dtype), alpha=weight)

    def mean(self, weight: float, like: Mapping[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
        mean = {}
        for k, v in like.items():
            own = self.total.get(k)  # absent on a rank without a client
            total = ranks.sum(torch.zeros_like(v, dtype=_summable(v.dtype)) if own is None else own) / weight
            mean[k] = (total if v.is_floating_point() else total.round()).to(v.dtype)
        return mean


def _summable(dtype: torch.dtype) -> torch.dtype:
    # integer buffers (BatchNorm's counter) are averaged exactly; halves would overflow
    return dtype if dtype in (torch.float32, torch.float64) else torch.float64


def play_round(
    rules: Rules,
    server: Server,
    states: Mapping[int, State],
    cohort: Cohort,
    *,
    observed: Collection[int] = (),
    ranks: Ranks | None = None,
) -> Round:
    """Broadcast, local work, protection, the wire, and the weighted mean.

    ``states`` holds the states of clients that played before; ``observed``: clients whose payloads are kept for the
    transcript. Mutates nothing. Raises ``NonFiniteError`` naming client, round and tensor.
    """
    ranks = ranks or Alone()
    params, defense, round_index = server.params, rules.defense, cohort.round_index
    clients = Clients(rules, server, states, cohort)
    shared = clients.announce()
    total, total_buffers, share = _Sum(), _Sum(), _Share()

    members = range(len(cohort.clients))[ranks.index :: ranks.count]
    for chunk in rules.executor.chunks(cohort, members, rules.victim.batch_coupled):
        outputs = clients.run(chunk, shared)
        finite = _finite(outputs.sent)
        for row, member in enumerate(chunk):
            client = cohort.clients[member]
            sent = {k: v[row] for k, v in outputs.sent.items()}
            if not finite[row]:
                if rules.on_nonfinite == "fail":
                    raise _nonfinite(sent, client, round_index)
                share.dropped.append(client)
                continue
            own_buffers = {k: v[row] for k, v in outputs.buffers.items()}
            payload = defense.codec.encode(sent, shared, cohort.num_examples[member])
            decoded = defense.codec.decode(payload, params, shared)
            weight = float(cohort.weights[member]) if rules.weighting == "examples" else 1.0
            total.add(decoded, weight)
            total_buffers.add(own_buffers, weight)
            share.loss += weight * float(outputs.loss[row])
            share.weight += weight
            share.uplink[client] = payload.num_bytes + _num_bytes(own_buffers)
            if outputs.state:
                # on the host, in its own memory: a view would keep the whole chunk alive
                share.states[client] = {k: v[row].to("cpu", copy=True) for k, v in outputs.state.items()}
            if client in observed:
                share.payloads[client] = payload
                share.updates[client], share.sent_buffers[client] = _copy(decoded), _copy(own_buffers)

    whole = _Share()
    for part in ranks.gather(share):
        whole.add(part)
    gone = tuple(sorted(whole.dropped))
    if not whole.weight:
        raise NonFiniteError(f"Round {round_index}: no client sent a finite update, so there is nothing to average.")

    mean = total.mean(whole.weight, params, ranks)
    aggregate, server_state = defense.compensate(mean, server.defense, shared)
    alive = [(c, n) for c, n in zip(cohort.clients, cohort.num_examples, strict=True) if c not in gone]
    num_examples = sum(n for _, n in alive)
    transcript = Transcript(
        round_index, _copy(params), _copy(server.buffers), shared,
        whole.payloads, whole.updates, whole.sent_buffers,
        _copy(mean), tuple(c for c, _ in alive), num_examples,
    )  # fmt: skip
    return Round(
        aggregate=aggregate,
        buffers=total_buffers.mean(whole.weight, server.buffers, ranks),
        server_state=server_state,
        states=whole.states,
        shared=shared,
        led=clients.asked,
        uplink_bytes=whole.uplink,
        aggregate_bytes=defense.codec.encode(aggregate, shared, num_examples).num_bytes,
        loss=whole.loss / whole.weight,
        dropped=gone,
        transcript=transcript if observed else None,
    )


def _finite(updates: Update) -> list[bool]:
    """Per client of a chunk, whether every entry of its update is finite."""
    each = torch.stack([u.flatten(1).isfinite().all(1) for u in updates.values()])
    return [bool(x) for x in each.all(0).tolist()]


def _nonfinite(sent: Update, client: int, round_index: int) -> NonFiniteError:
    names = [k for k, v in sent.items() if not bool(v.isfinite().all())]
    return NonFiniteError(
        f"Client {client} sent NaN or infinity in round {round_index} (in {', '.join(names)}). "
        "Lower the learning rate, look at its data, or go on without it: fl.on_nonfinite=drop_client."
    )


def _num_bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(t.nbytes for t in tensors.values())


def _copy(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in tensors.items()}
