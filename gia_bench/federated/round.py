"""One federated round as a function of the server's state, the clients' states and the cohort."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from gia_bench.data.cohort import Cohort
from gia_bench.errors import NonFiniteError
from gia_bench.federated.aggregation import Meeting
from gia_bench.federated.clients import Clients, Own
from gia_bench.federated.ranks import Alone, Ranks
from gia_bench.federated.rules import Rules, Server
from gia_bench.values import Buffers, Params, Payload, Shared, State, Transcript, Update

Keep: TypeAlias = Callable[[int, int, State], State]
"""(client, round, its next state) -> the same state as it is held until the next round."""

KEPT = "state "
"""Before the names of what a defense keeps between rounds."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Round:
    """What a round leaves behind. aggregate: the compensated weighted mean, for the server's optimizer; states: of the
    clients that played; led: whether a client (and not the server) made the announcement ``shared``; uplink_bytes: per
    client, as packed; aggregate_bytes: what ``aggregate`` takes on the way down; model_bytes: what the broadcast model
    does; dropped: clients that sent nothing, since their
    updates were not finite or they vanished; transcript: None where nobody was observed.
    """

    aggregate: Update
    buffers: Buffers
    server_state: State
    states: Mapping[int, State]
    shared: Shared
    led: bool
    uplink_bytes: Mapping[int, int]
    aggregate_bytes: int
    model_bytes: int
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
    evidence: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    sent_buffers: dict[int, Buffers] = field(default_factory=dict)
    own_params: dict[int, Params] = field(default_factory=dict)
    loss: float = 0.0
    weight: float = 0.0

    def add(self, other: _Share) -> None:
        self.states |= other.states
        self.uplink |= other.uplink
        self.dropped += other.dropped
        self.payloads |= other.payloads
        self.updates |= other.updates
        self.evidence |= other.evidence
        self.sent_buffers |= other.sent_buffers
        self.own_params |= other.own_params
        self.loss += other.loss
        self.weight += other.weight


def play_round(
    rules: Rules,
    server: Server,
    states: Mapping[int, State],
    cohort: Cohort,
    *,
    observed: Collection[int] = (),
    ranks: Ranks | None = None,
    keep: Keep | None = None,
    own: Own | None = None,
) -> Round:
    """Broadcast, local work, protection, the wire, and the weighted mean.

    ``states`` holds the states of clients that played before; ``observed``: clients whose payloads are kept for the
    transcript; keep: where each client's next state goes at once, so that a cohort's need not fit the memory together;
    own: what each member is sent, where that is not ``server.params`` for all (malicious rounds). Mutates nothing.
    Raises ``NonFiniteError`` naming client, round and tensor.
    """
    ranks = ranks or Alone()
    params, defense, round_index = server.params, rules.defense, cohort.round_index
    clients = Clients(rules, server, states, cohort, own)
    shared = clients.announce()
    like = params | defense.asks(params, shared)
    weights = cohort.weights if rules.weighting == "examples" else (1,) * len(cohort.clients)
    gathering = rules.aggregation.begin(
        Meeting(
            seed=rules.seed, round_index=round_index, clients=cohort.clients, weights=weights, like=like,
            buffers=server.buffers, shared=shared, codec=defense.codec,
        )
    )  # fmt: skip
    share = _Share()

    members = [
        member
        for member in range(len(cohort.clients))[ranks.index :: ranks.count]
        if cohort.clients[member] not in gathering.vanished
    ]
    for chunk in rules.executor.chunks(cohort, members, rules.victim.batch_coupled):
        outputs = clients.run(chunk, shared)
        kept = {f"{KEPT}{k}": v for k, v in outputs.state.items() if v.is_floating_point()}
        everything = outputs.sent | {f"buffer {k}": v for k, v in outputs.buffers.items()} | kept
        finite = _finite(everything)
        for row, member in enumerate(chunk):
            client = cohort.clients[member]
            sent = {k: v[row] for k, v in outputs.sent.items()}
            if not finite[row]:
                if rules.on_nonfinite == "fail":
                    own_update = clients.unprotected(member)
                    raise _nonfinite({k: v[row] for k, v in everything.items()}, own_update, client, round_index)
                share.dropped.append(client)
                continue
            own_buffers = {k: v[row] for k, v in outputs.buffers.items()}
            received = gathering.receive(member, cohort.said[member], sent, own_buffers)
            share.loss += weights[member] * float(outputs.loss[row])
            share.weight += weights[member]
            share.uplink[client] = received.num_bytes
            if outputs.state:
                # on the host, in its own memory: a view would keep the whole chunk alive
                state = {k: v[row].to("cpu", copy=True) for k, v in outputs.state.items()}
                share.states[client] = state if keep is None else keep(client, round_index, state)
            if client in observed:
                share.payloads[client] = received.payload
                if received.update is not None:
                    share.updates[client], share.evidence[client] = _split(received.update, params)
                    share.sent_buffers[client] = _copy(own_buffers)
                    if own is not None:
                        share.own_params[client] = _copy(own(member))

    whole = _Share()
    for part in ranks.gather(share):
        whole.add(part)
    gone = tuple(sorted({*whole.dropped, *gathering.vanished}))
    if not whole.weight:
        raise NonFiniteError(f"Round {round_index}: no client sent a finite update, so there is nothing to average.")

    mean, buffers = gathering.means(gone, ranks)
    counted = [w for c, w in zip(cohort.clients, weights, strict=True) if c not in gone]
    shares = [w / sum(counted) for w in counted]
    aggregate, server_state = defense.compensate(mean, server.defense, shared, shares)
    alive = [(c, n) for c, n in zip(cohort.clients, cohort.said, strict=True) if c not in gone]
    num_examples = sum(n for _, n in alive)
    transcript = Transcript(
        round_index, _copy(params), _copy(server.buffers), shared,
        whole.payloads, whole.updates, whole.sent_buffers,
        _split(mean, params)[0], tuple(c for c, _ in alive), num_examples, whole.evidence, whole.own_params,
    )  # fmt: skip
    return Round(
        aggregate=aggregate,
        buffers=buffers,
        server_state=server_state,
        states=whole.states,
        shared=shared,
        led=clients.asked,
        uplink_bytes=whole.uplink,
        aggregate_bytes=defense.codec.encode(aggregate, shared, num_examples).num_bytes,
        model_bytes=defense.model_codec.encode(params, shared, 0).num_bytes,
        loss=whole.loss / whole.weight,
        dropped=gone,
        transcript=transcript if observed else None,
    )


def _finite(updates: Update) -> list[bool]:
    """Per client of a chunk [K, ...], whether every entry of every tensor is finite."""
    rows = [u.reshape(len(u), -1) for u in updates.values() if u.numel()]
    # the largest and the smallest show every NaN and infinity; isfinite on every entry is ten times slower
    each = torch.stack([extreme.isfinite() for row in rows for extreme in (row.amax(1), row.amin(1))])
    return [bool(x) for x in each.all(0).tolist()]


def _nonfinite(sent: Update, own: Update, client: int, round_index: int) -> NonFiniteError:
    """sent: after protection, where one NaN may have become many; own: before it."""
    names, before = _broken(sent), _broken(own)
    if before == names:
        origin = ""
    elif before:
        origin = f"Before protection its update by plain gradients was not finite in {_listed(before)}. "
    else:
        origin = "Before protection its update by plain gradients was finite: the defense made it so. "
    # a defense that decides by what it keeps may hide its NaN from what is sent
    does = "keeps" if all(name.startswith(KEPT) for name in names) else "sent"
    return NonFiniteError(
        f"Client {client} {does} NaN or infinity in round {round_index} (in {_listed(names)}). {origin}"
        "Lower the learning rate, look at its data, or go on without it: fl.on_nonfinite=drop_client."
    )


def _broken(tensors: Update) -> list[str]:
    return [k for k, v in tensors.items() if not bool(v.isfinite().all())]


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}"


def _split(sent: Mapping[str, Tensor], params: Mapping[str, Tensor]) -> tuple[Update, dict[str, Tensor]]:
    """Copies of the update and of the evidence beside it."""
    return _copy({k: sent[k] for k in params}), _copy({k: v for k, v in sent.items() if k not in params})


def _copy(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in tensors.items()}
