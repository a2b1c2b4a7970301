"""The round that a malicious server plays beside the honest one: other broadcast, same clients, nothing kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from gia_bench.attacks.base import Attack, Broadcast
from gia_bench.data.cohort import Cohort
from gia_bench.defenses.base import Defense
from gia_bench.errors import NonFiniteError
from gia_bench.federated.clients import Own
from gia_bench.federated.execution import Loop
from gia_bench.federated.round import play_round
from gia_bench.federated.rules import Rules, Server
from gia_bench.models.functional import Victim
from gia_bench.seeding import derive
from gia_bench.threat import Knowledge, Power, ThreatModel
from gia_bench.values import Examples, Params, State, Transcript


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class MaliciousRound:
    """transcript: None where no client sent a finite update; dropped: clients that sent none."""

    victim: Victim
    defense: Defense
    transcript: Transcript | None
    dropped: tuple[int, ...]


def play_malicious_round(
    name: str,
    attack: Attack,
    rules: Rules,
    before: tuple[Server, Mapping[int, State]],
    cohort: Cohort,
    observed: Collection[int],
    threat: ThreatModel,
    public: Examples,
) -> MaliciousRound:
    """What the observed clients of ``cohort`` send when they get the broadcast that ``attack`` tampered with.

    before: the server and the clients' states as the honest round found them. The clients hold the same batches and
    residuals and draw the same random numbers as in the honest round. Those who are not observed take part only where
    that can be seen: in an aggregate, or where the defense has a leader among them. The defense announces anew, on the
    malicious model, and is calibrated on it where the model changed; what it remembers by the name of a tensor stays,
    and for tensors that the attacker added it begins. Where the attack sends each client its own values, clients are
    computed one after another in the same round: so a leader's announcement, secure aggregation and dropouts stay what
    they are, which single rounds of one client each would not have. A client whose update is not finite is dropped.
    Mutates nothing.
    """
    server, states = before
    seed = derive(rules.seed, "tamper", name, cohort.round_index)
    shown = public if Knowledge.PUBLIC in threat.knows else None
    if threat.sees_clients and not _announces(rules.defense):
        cohort = _only(cohort, observed)
    honest, num_clients = Broadcast(rules.victim, server.params, server.buffers), len(cohort.clients)

    def own(member: int) -> Params:
        return attack.tamper_for(honest, member, num_clients, seed=seed, public=shown).params

    if attack.personal:
        sent = attack.tamper_for(honest, 0, num_clients, seed=seed, public=shown)
        sent = sent._replace(params=_mean(own, num_clients))
        rules = dataclasses.replace(rules, executor=Loop())
    else:
        sent = attack.tamper(honest, seed=seed, public=shown)
    defense = rules.defense.calibrate(sent.victim, public) if Power.CHANGE_MODEL in attack.needs else rules.defense
    malicious = dataclasses.replace(rules, victim=sent.victim, defense=defense, on_nonfinite="drop_client")
    begun = defense.init_client(sent.params)
    begins = Server(sent.params, sent.buffers, _carried(server.defense, defense.init_server(sent.params)))
    known = {c: _carried(state, begun) for c, state in states.items()}
    try:
        with torch.no_grad():
            played = play_round(
                malicious, begins, known, cohort, observed=observed, own=own if attack.personal else None
            )
    except NonFiniteError:
        return MaliciousRound(victim=sent.victim, defense=defense, transcript=None, dropped=cohort.clients)
    return MaliciousRound(victim=sent.victim, defense=defense, transcript=played.transcript, dropped=played.dropped)


def _mean(own: Own, num_clients: int) -> Params:
    mean: dict[str, Tensor] = dict(own(0))
    for member in range(1, num_clients):
        # so that what is the same for all stays as it is, to the last bit
        mean = {k: mean[k] + (v - mean[k]) / (member + 1) for k, v in own(member).items()}
    return mean


def _announces(defense: Defense) -> bool:
    return any(type(leaf).announce is not Defense.announce for leaf in defense.leaves())


def _only(cohort: Cohort, clients: Collection[int]) -> Cohort:
    rows = [i for i, c in enumerate(cohort.clients) if c in clients]
    return dataclasses.replace(
        cohort,
        clients=tuple(cohort.clients[i] for i in rows),
        steps=tuple(cohort.steps[i] for i in rows),
        weights=tuple(cohort.weights[i] for i in rows),
    )


def _carried(own: State, begun: State) -> State:
    """``begun``, with what is remembered of tensors that are still there, in the same shape."""
    return {k: own[k] if k in own and own[k].shape == v.shape else v for k, v in begun.items()}
