"""A malicious round in which every client gets values of its own: one round, with everything a round has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command import gia_bench

from gia_bench.attacks.base import Broadcast
from gia_bench.attacks.compensating import Compensating
from gia_bench.attacks.loki import Loki
from gia_bench.attacks.robbing import RobbingTheFed
from gia_bench.data.cohort import Cohort
from gia_bench.data.source import InMemory
from gia_bench.defenses.adgp import ADGP
from gia_bench.defenses.base import Defense
from gia_bench.defenses.dgp import DGP
from gia_bench.defenses.none import NoDefense
from gia_bench.federated.aggregation import Aggregation, Plain
from gia_bench.federated.execution import Executor, Loop, Vmap
from gia_bench.federated.local import FedSGD
from gia_bench.federated.rules import Rules, Server
from gia_bench.federated.secure import Secure
from gia_bench.models.functional import Victim
from gia_bench.models.lenet import lenet
from gia_bench.probes.malicious import MaliciousRound, play_malicious_round
from gia_bench.seeding import derive, seeded, stream
from gia_bench.threat import ThreatModel
from gia_bench.values import Batch, Params

ATTACK = Loki(num_bins=8)
KNOWS = ("buffers", "num_examples", "shared", "public")
SEES_CLIENTS = ThreatModel.named("m", ("update", *KNOWS), ("change_model",))
SEES_SUM = ThreatModel.named("s", ("aggregate", *KNOWS), ("change_model",))
COMMAND = (
    "dataset=digits", "model=lenet_zhu", "threat=malicious_aggregate", "attack=[loki]", "attack.loki.num_bins=64",
    "name=personal", "fl.rounds=3", "fl.eval_every=3", "fl.attack_rounds=[1]", "partition.num_clients=3",
    "fl.local.batch_size=4", "metrics.lpips=null", "logger=none",
)  # fmt: skip


def play(
    defense: Defense,
    executor: Executor,
    threat: ThreatModel,
    aggregation: Aggregation | None = None,
) -> tuple[MaliciousRound, Cohort, list[Params], Params]:
    with seeded(0, "test model"):
        victim = Victim(module=lenet((1, 8, 8), 3, width=2), input_shape=(1, 8, 8), num_classes=3)
    generator = stream(0, "test images")
    source = InMemory(torch.rand(48, 1, 8, 8, generator=generator), torch.randint(3, (48,), generator=generator))
    cohort = Cohort(
        round_index=2,
        clients=(7, 3, 5, 1),
        steps=tuple((rows,) for rows in torch.arange(16).split([4, 3, 5, 4])),
        weights=(4, 3, 5, 4),
        source=source,
    )
    rules = Rules(
        victim=victim, defense=defense, local=FedSGD(batch_size=4), executor=executor, seed=3,
        aggregation=aggregation or Plain(),
    )  # fmt: skip
    params, buffers = victim.initial()
    server = Server(params, buffers, defense.init_server(params))
    played = play_malicious_round("loki", ATTACK, rules, (server, {}), cohort, (7, 3), threat, source)
    seed, honest = derive(3, "tamper", "loki", 2), Broadcast(victim, params, buffers)
    num_clients = 4 if played.transcript is None else len(played.transcript.clients)
    sent = [ATTACK.tamper_for(honest, p, num_clients, seed=seed, public=source).params for p in range(num_clients)]
    return played, cohort, sent, params


@pytest.mark.parametrize("executor", [Loop(), Vmap(chunk_size=3)], ids=["loop", "vmap"])
def test_each_client_sends_the_gradient_of_what_it_was_sent_and_the_mean_is_that_of_these(executor: Executor) -> None:
    played, cohort, sent, honest = play(NoDefense(), executor, SEES_SUM)
    assert played.transcript is not None and played.transcript.clients == cohort.clients
    mean: dict[str, torch.Tensor] = {}
    for member in range(4):
        batch = Batch(*(t[0, 0] for t in cohort.batch([member])))
        update = torch.func.grad(lambda p: played.victim.objective(p, {}, batch)[0])(sent[member])  # noqa: B023
        for name, part in update.items():
            mean[name] = mean.get(name, torch.zeros_like(part)) + cohort.weights[member] / 16 * part
        if cohort.clients[member] in (7, 3):
            own = played.transcript.own_params[cohort.clients[member]]
            assert all(torch.equal(own[k], v) for k, v in sent[member].items())
            torch.testing.assert_close(played.transcript.updates[cohort.clients[member]], update, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(played.transcript.aggregate, mean, atol=1e-6, rtol=1e-4)
    # what the sum was started from: the mean over the clients, and the honest tensors to the last bit
    assert all(torch.equal(played.transcript.params[k], v) for k, v in honest.items())
    kernels = torch.stack([p["imprint.sets.weight"] for p in sent]).mean(0)
    torch.testing.assert_close(played.transcript.params["imprint.sets.weight"], kernels)


def test_only_observed_clients_play_where_each_is_seen_alone() -> None:
    played, _, sent, _ = play(DGP(), Vmap(), SEES_CLIENTS)
    assert played.transcript is not None and played.transcript.clients == (7, 3)
    assert set(played.transcript.own_params) == {7, 3}
    assert len(sent) == 2


def test_one_leader_announces_for_all_although_each_has_its_own_values() -> None:
    played, cohort, _, _ = play(ADGP(leader="round_robin"), Vmap(), SEES_CLIENTS)
    assert played.transcript is not None
    assert played.transcript.clients == cohort.clients
    assert any("imprint.weight" in k for k in played.transcript.shared)
    # what a client sends lies within the one mask of all
    masks = [v for k, v in played.transcript.shared.items() if k.endswith("imprint.weight")]
    for update in played.transcript.updates.values():
        assert not update["imprint.weight"][~masks[0].bool().view_as(update["imprint.weight"])].any()


def test_masks_cancel_in_the_sum_of_personal_updates() -> None:
    masked, cohort, _, _ = play(NoDefense(), Vmap(), SEES_SUM, Secure(clip=1.0))
    plain, _, _, _ = play(NoDefense(), Vmap(), SEES_SUM)
    assert masked.transcript is not None and plain.transcript is not None
    assert not masked.transcript.updates and not masked.transcript.own_params
    assert masked.transcript.num_examples == sum(cohort.num_examples)
    torch.testing.assert_close(masked.transcript.aggregate, plain.transcript.aggregate, atol=1e-6, rtol=0)


def test_an_attack_around_a_personal_one_is_personal() -> None:
    assert Compensating(attack=ATTACK).personal and not Compensating(attack=RobbingTheFed()).personal


def records(outputs: Path) -> list[dict[str, Any]]:
    [path] = outputs.glob("personal/*/records.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("extra", [(), ("fl=fedavg", "fl.local.learning_rate=0.01", "fl.local.batch_size=64")])
def test_a_run_measures_the_sum_against_the_images_of_all_clients(extra: tuple[str, ...], tmp_path: Path) -> None:
    ended = gia_bench(tmp_path, *COMMAND, *extra)
    assert ended.status == 0, ended.err
    found = [r for r in records(tmp_path) if r["metric"] == "psnr_db"]
    assert {r["client"] for r in found} == {None}
    if not extra:
        assert len(found) == 12  # three clients with four images each
        assert all(r["value"] is not None and r["value"] > 60 for r in found), "many digits are equally bright"
