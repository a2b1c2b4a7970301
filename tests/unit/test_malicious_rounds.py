"""The malicious round beside the honest one: same clients, nothing kept, and training goes on as if it had not been."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from command import gia_bench

from gia_bench.attacks.base import Broadcast
from gia_bench.attacks.robbing import RobbingTheFed
from gia_bench.data.cohort import Cohort
from gia_bench.data.source import InMemory
from gia_bench.defenses.adgp import ADGP
from gia_bench.defenses.base import Defense
from gia_bench.defenses.chain import Chain
from gia_bench.defenses.dgp import DGP
from gia_bench.defenses.none import NoDefense
from gia_bench.federated.execution import Executor, Loop, Vmap
from gia_bench.federated.local import FedSGD
from gia_bench.federated.round import play_round
from gia_bench.federated.rules import Rules, Server
from gia_bench.models.functional import Victim
from gia_bench.models.lenet import lenet
from gia_bench.probes.malicious import MaliciousRound, play_malicious_round
from gia_bench.seeding import derive, seeded, stream
from gia_bench.threat import ThreatModel
from gia_bench.values import Batch, State

ATTACK = RobbingTheFed(num_bins=16)
KNOWS = ("buffers", "num_examples", "shared", "public")
SEES_CLIENTS = ThreatModel.named("m", ("update", *KNOWS), ("change_model",))
SEES_SUM = ThreatModel.named("s", ("aggregate", *KNOWS), ("change_model",))
COMMAND = (
    "dataset=digits", "model=lenet_zhu", "threat=malicious_model", "defense=dgp", "name=malicious", "fl.rounds=6",
    "fl.eval_every=2", "fl.attack_rounds=[1,3]", "partition.num_clients=4", "fl.local.batch_size=4",
    "metrics.lpips=null",
)  # fmt: skip
MALICIOUS = "attack=[robbing_the_fed,curious_abandon_honesty]"


def setting(defense: Defense, executor: Executor) -> tuple[Rules, Server, Cohort, InMemory]:
    with seeded(0, "test model"):
        victim = Victim(module=lenet((1, 8, 8), 3, width=2), input_shape=(1, 8, 8), num_classes=3)
    generator = stream(0, "test images")
    source = InMemory(torch.rand(48, 1, 8, 8, generator=generator), torch.randint(3, (48,), generator=generator))
    cohort = Cohort(
        round_index=2,
        clients=(7, 3, 5, 1),
        steps=tuple((rows,) for rows in torch.arange(16).split(4)),
        weights=(4, 4, 4, 4),
        source=source,
    )
    rules = Rules(victim=victim, defense=defense, local=FedSGD(batch_size=4), executor=executor, seed=3)
    params, buffers = victim.initial()
    return rules, Server(params, buffers, defense.init_server(params)), cohort, source


def play(
    defense: Defense, executor: Executor, states: dict[int, State], threat: ThreatModel = SEES_CLIENTS
) -> tuple[MaliciousRound, Rules, Server, Cohort]:
    rules, server, cohort, source = setting(defense, executor)
    played = play_malicious_round("rob", ATTACK, rules, (server, states), cohort, (7, 3), threat, source)
    return played, rules, server, cohort


@pytest.mark.parametrize("executor", [Loop(), Vmap(chunk_size=3)], ids=["loop", "vmap"])
def test_the_observed_clients_send_the_gradient_of_the_malicious_model_on_their_own_batches(executor: Executor) -> None:
    played, rules, server, cohort = play(NoDefense(), executor, {})
    public = cohort.source
    seed = derive(3, "tamper", "rob", 2)
    sent = ATTACK.tamper(Broadcast(rules.victim, server.params, server.buffers), seed=seed, public=public)
    assert played.transcript is not None
    assert played.transcript.clients == (7, 3)
    assert all(torch.equal(played.transcript.params[k], v) for k, v in sent.params.items())
    for member, client in enumerate((7, 3)):
        batch = Batch(*(t[0, 0] for t in cohort.batch([member])))
        expected = torch.func.grad(lambda p: sent.victim.objective(p, {}, batch)[0])(sent.params)  # noqa: B023
        torch.testing.assert_close(played.transcript.updates[client], expected, atol=1e-6, rtol=1e-4)


def test_residuals_of_the_honest_model_are_sent_and_new_tensors_begin_with_none() -> None:
    defense = DGP()
    _, server, _, _ = setting(defense, Vmap())
    own = {k: torch.full_like(v, 1e3) if k.startswith("residual") else v
           for k, v in defense.init_client(server.params).items()}  # fmt: skip
    kept = {k: v.clone() for k, v in own.items()}
    with_it, without = (play(defense, Vmap(), states)[0].transcript for states in ({7: own}, {}))
    assert with_it is not None and without is not None
    for name, update in with_it.updates[7].items():
        if name.startswith("imprint"):
            assert torch.equal(update, without.updates[7][name])
        else:
            assert float(update.max()) > 900
    assert all(torch.equal(with_it.updates[3][k], v) for k, v in without.updates[3].items())
    assert all(torch.equal(own[k], v) for k, v in kept.items())


@pytest.mark.parametrize("defense", [ADGP(leader="round_robin"), Chain(stages={"a": ADGP(leader="round_robin")})])
def test_a_leader_among_the_unobserved_announces_anew_for_the_malicious_model(defense: Defense) -> None:
    played, _, _, cohort = play(defense, Vmap(), {})  # round 2: the third client leads
    assert played.transcript is not None
    assert played.transcript.clients == cohort.clients
    assert any("imprint.weight" in k for k in played.transcript.shared)
    assert set(played.transcript.updates) == {7, 3}


def test_under_secure_aggregation_the_whole_cohort_plays_the_malicious_round() -> None:
    played = play(NoDefense(), Vmap(), {}, SEES_SUM)[0]
    assert played.transcript is not None
    assert played.transcript.num_examples == 16
    assert "imprint.weight" in played.transcript.aggregate


def test_a_malicious_round_without_any_finite_update_is_counted_and_ends_nothing() -> None:
    rules, server, cohort, source = setting(NoDefense(), Vmap())
    broken = Server({k: v * torch.nan for k, v in server.params.items()}, server.buffers, server.defense)
    played = play_malicious_round("rob", ATTACK, rules, (broken, {}), cohort, (7, 3), SEES_CLIENTS, source)
    assert played.transcript is None and played.dropped == (7, 3)


def test_the_honest_round_is_the_same_before_and_after_a_malicious_one() -> None:
    rules, server, cohort, source = setting(DGP(), Vmap())
    first = play_round(rules, server, {}, cohort, observed=(7,))
    play_malicious_round("rob", ATTACK, rules, (server, first.states), cohort, (7, 3), SEES_CLIENTS, source)
    second = play_round(rules, server, {}, cohort, observed=(7,))
    assert all(torch.equal(second.aggregate[k], v) for k, v in first.aggregate.items())


def final(outputs: Path) -> dict[str, Any]:
    [path] = outputs.glob("malicious/*/final.ckpt")
    checkpoint: dict[str, Any] = torch.load(path, weights_only=True)
    return checkpoint


def records(outputs: Path) -> list[dict[str, Any]]:
    [path] = outputs.glob("malicious/*/records.jsonl")
    return [r for r in map(json.loads, path.read_text().splitlines()) if r["unit"] != "s"]


def test_training_under_attack_is_bit_equal_to_training_in_peace(tmp_path: Path) -> None:
    assert gia_bench(tmp_path / "war", *COMMAND, MALICIOUS).status == 0
    assert gia_bench(tmp_path / "peace", *COMMAND, "attack=[]").status == 0
    attacked, peaceful = final(tmp_path / "war"), final(tmp_path / "peace")
    for name, tensor in peaceful["state_dict"].items():
        assert torch.equal(attacked["state_dict"][name], tensor)
    assert peaceful["federation"]["client_states"]
    for client, state in peaceful["federation"]["client_states"].items():
        for name, tensor in state.items():
            assert torch.equal(attacked["federation"]["client_states"][client][name], tensor)
    war = [r for r in records(tmp_path / "war") if not r["attack"]]
    assert [(r["metric"], r["value"]) for r in war] == [
        (r["metric"], r["value"]) for r in records(tmp_path / "peace") if not r["attack"]
    ]
    assert {r["round"] for r in records(tmp_path / "war") if r["metric"] == "psnr_db"} == {1, 3}


def kill_in_the_second_malicious_round() -> None:
    import gia_bench.probes.leakage as leakage

    play, calls = leakage.play_malicious_round, []

    def counted(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return play(*arguments)

    leakage.play_malicious_round = counted


def test_a_run_killed_in_a_malicious_round_ends_with_the_same_records(tmp_path: Path) -> None:
    assert gia_bench(tmp_path / "whole", *COMMAND, MALICIOUS).status == 0
    assert gia_bench(tmp_path / "broken", *COMMAND, MALICIOUS, before=kill_in_the_second_malicious_round).status < 0
    assert gia_bench(tmp_path / "broken", *COMMAND, MALICIOUS).status == 0
    # the run's identity leaves paths out
    assert records(tmp_path / "broken") == records(tmp_path / "whole")


@pytest.mark.parametrize(
    ("choices", "sentence"),
    [
        (("threat=curious_server", "attack=[class_fishing]"), "can change_params, which threat=curious_server cannot; "
         "choose threat=malicious_params"),
        (("threat=malicious_params", MALICIOUS), "can change_model, which threat=malicious_params cannot; choose "
         "threat=malicious_model"),
        (("fl=fedavg", MALICIOUS), "takes updates of at most 1 local step(s)"),
    ],
)  # fmt: skip
def test_a_server_or_a_schedule_that_cannot_do_it_is_refused_with_a_way_out(
    choices: tuple[str, ...], sentence: str, tmp_path: Path
) -> None:
    ended = gia_bench(tmp_path, *COMMAND, *choices)
    assert ended.status == 1
    assert sentence in " ".join(ended.err.split())
