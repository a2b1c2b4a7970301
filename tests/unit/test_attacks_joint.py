"""Several rounds of one client: the sum tells what single rounds withhold."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from attack_problems import problem
from command import SMALL, gia_bench

from gia_bench.attacks.adaptive import Withheld
from gia_bench.attacks.dlg import dlg
from gia_bench.attacks.evidence import misfit
from gia_bench.attacks.inverting_gradients import inverting_gradients
from gia_bench.attacks.joint import AllRounds, joined
from gia_bench.attacks.labels import accuracy, auto
from gia_bench.defenses.adgp import ADGP
from gia_bench.defenses.base import Client, Defense
from gia_bench.defenses.dgp import DGP
from gia_bench.defenses.top_k import TopK
from gia_bench.errors import ConfigError, StorageError
from gia_bench.federated.local import FedAvg
from gia_bench.probes.history import History
from gia_bench.probes.leakage import LeakageProbe
from gia_bench.seeding import stream
from gia_bench.values import Batch, Observation, Reconstruction, Update
from gia_bench.wire.aligned import MASK

P = problem(2, batch=2)


def later(o: Observation, i: int, move: float) -> Observation:
    """The same client at other weights."""
    params = {k: v + move * torch.ones_like(v) for k, v in o.params.items()}
    batch = Batch(P.images[i], P.labels[i], torch.ones(2))
    update = torch.func.grad(lambda p: P.victim.objective(p, o.buffers, batch)[0])(params)
    return dataclasses.replace(o, params=params, update=update)


def test_the_truth_explains_the_sum_of_rounds_each_at_its_own_weights() -> None:
    o = P.observations[0]
    now = dataclasses.replace(later(o, 0, 0.2), earlier=(o, later(o, 0, 0.1)))
    joint = joined(now, P.victim)
    for k, total in joint.update.items():
        torch.testing.assert_close(3 * total, now.update[k] + sum(e.update[k] for e in now.earlier))
    right = Reconstruction(inputs=P.images[0], labels=P.labels[0], score=0.0)
    assert misfit(right, joint, P.victim, replay=AllRounds()) == pytest.approx(0, abs=1e-5)
    assert misfit(right, joint, P.victim) > 1e-4  # at the last weights alone it does not


def test_labels_are_read_off_the_rounds_together_as_off_one() -> None:
    """Eight examples and four rounds: a sum would be read as one gradient that is four times as long."""
    p, rounds = problem(1, batch=8, classes=10, shape=(1, 12, 12)), 4
    first, batch = p.observations[0], Batch(p.images[0], p.labels[0], torch.ones(8))
    seen = []
    for r in range(rounds):
        params = {k: v + 0.01 * r * torch.randn(v.shape, generator=stream(r, k)) for k, v in first.params.items()}
        update = torch.func.grad(lambda q: p.victim.objective(q, first.buffers, batch)[0])(params)
        seen.append(dataclasses.replace(first, params=params, update=update))
    now = dataclasses.replace(seen[-1], earlier=tuple(seen[:-1]))
    one, joint = (accuracy(auto(o, p.victim), p.labels[0]) for o in (seen[-1], joined(now, p.victim)))
    assert joint >= one > 0.7
    total = dataclasses.replace(now, update={k: rounds * v for k, v in joined(now, p.victim).update.items()})
    assert accuracy(auto(total, p.victim), p.labels[0]) < one


def test_rounds_of_another_number_of_examples_are_left_out() -> None:
    o = P.observations[0]
    other = dataclasses.replace(o, num_examples=3)
    assert joined(dataclasses.replace(o, earlier=(other, o)), P.victim).earlier[0].num_examples == 2
    assert len(joined(dataclasses.replace(o, earlier=(other, o)), P.victim).earlier) == 1


@pytest.mark.parametrize("defense", [DGP(k1=0.05, k2=0.75), TopK()])
def test_who_knows_that_a_defense_repays_finds_exact_sums_where_the_last_round_sent(defense: Defense) -> None:
    """Three rounds at other weights. One round alone is off by what it repays, the plain sum by what is still owed."""
    first, batch = P.observations[0], Batch(P.images[0], P.labels[0], torch.ones(2))
    state, rounds = defense.init_client(first.update), []
    for o in (first, later(first, 0, 0.1), later(first, 0, 0.2)):
        sent, state = defense.protect(o.update, Client(P.victim, o.params, {}, batch), state, {}, {})
        rounds.append(dataclasses.replace(o, update=sent, defense=defense))
    *before, last = rounds
    now = dataclasses.replace(last, earlier=tuple(before))
    right = Reconstruction(inputs=P.images[0], labels=P.labels[0], score=0.0)
    informed, oblivious = (joined(o, P.victim) for o in (now, dataclasses.replace(now, defense=None)))
    assert informed.defense is defense and oblivious.defense is None
    assert {k: (v != 0).sum() for k, v in informed.update.items()} == {
        k: (v != 0).sum() for k, v in last.update.items()
    }
    assert misfit(right, informed, P.victim, replay=AllRounds()) == pytest.approx(0, abs=1e-5)
    assert misfit(right, oblivious, P.victim, replay=AllRounds()) > 1e-3
    assert misfit(right, last, P.victim) > 1e-3


def test_an_announced_mask_says_where_sums_are_exact_though_the_last_round_sent_zero_there() -> None:
    first = P.observations[0]
    shared = {MASK + k: torch.ones_like(v, dtype=torch.bool) for k, v in first.update.items()}
    silent = {k: torch.zeros_like(v) for k, v in first.update.items()}
    last = dataclasses.replace(first, update=silent, shared=shared, defense=ADGP(), earlier=(first,))
    for k, total in joined(last, P.victim).update.items():
        assert torch.equal(2 * total, first.update[k])


@pytest.mark.parametrize("change", [{"enabled": False}, {"decay": 0.9}, {"scale": 0.5}])
def test_feedback_that_loses_something_repays_nothing(change: dict[str, Any]) -> None:
    own = DGP().error_feedback
    assert DGP().repays and not DGP(error_feedback=dataclasses.replace(own, **change)).repays
    forgetful = dataclasses.replace(P.observations[0], defense=DGP(error_feedback=dataclasses.replace(own, **change)))
    assert joined(dataclasses.replace(forgetful, earlier=(P.observations[0],)), P.victim).defense is None
    missing = dataclasses.replace(P.observations[0], num_examples=3)
    known = dataclasses.replace(P.observations[0], defense=DGP(), earlier=(missing,))
    assert joined(known, P.victim).defense is None, "a round that is left out is owed something too"
    whole = dataclasses.replace(known, earlier=(P.observations[0],))
    assert joined(whole, P.victim).defense is not None
    assert joined(dataclasses.replace(whole, num_clients=2), P.victim).defense is None
    assert joined(dataclasses.replace(whole, unseen=1), P.victim).defense is None, "so is one that nobody looked at"


def test_bounds_of_one_round_are_refused_for_sums() -> None:
    with pytest.raises(ConfigError, match="bound what one round withholds"):
        inverting_gradients(rounds="joint", constraints={"withheld": Withheld(relative=True)})
    with pytest.raises(ConfigError, match="joint, one"):
        inverting_gradients(rounds="all")


def test_any_attack_that_matches_gradients_takes_the_rounds_together() -> None:
    """What was sent in two rounds together, each at its own weights, was the client's; each alone was tampered with, so
    that the search from it ends elsewhere."""
    first, draw = P.observations[0], torch.Generator().manual_seed(0)
    noise = {k: torch.randn(v.shape, generator=draw) for k, v in first.update.items()}
    last = later(first, 0, 0.1)
    size = 0.3 * _norm(first.update) / _norm(noise)
    withheld = dataclasses.replace(first, update={k: v - size * noise[k] for k, v in first.update.items()})
    repaid = dataclasses.replace(last, update={k: v + size * noise[k] for k, v in last.update.items()})
    both = dataclasses.replace(repaid, earlier=(withheld,), labels=P.labels[0])
    alone, joint = (dlg(labels="known", steps=20, rounds=r).reconstruct(both, P.victim) for r in ("one", "joint"))
    assert joint.score < 1e-3 * alone.score
    far, near = ((r.inputs - P.images[0]).square().mean() for r in (alone, joint))
    assert near < far


def test_the_count_of_rounds_survives_a_checkpoint_and_one_without_it_is_refused() -> None:
    def probe() -> LeakageProbe:
        attacks: dict[str, Any] = {"joint": inverting_gradients(steps=1, rounds="joint")}
        rest: Any = dict.fromkeys(["recorder", "threat", "metrics", "public", "folder"])
        return LeakageProbe(attacks=attacks, images=False, snapshot_every_seconds=1.0, **rest)

    first, second = probe(), probe()
    first.load_state_dict({"history": [], "rounds": {0: 3, 5: 1}})
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert second.state_dict()["rounds"] == {0: 3, 5: 1}
    with pytest.raises(StorageError, match="force=true"):
        second.load_state_dict({"history": []})


def test_rounds_that_nobody_looked_at_are_counted() -> None:
    history, o = History(), P.observations[0]
    history.rounds.update({0: 3, 1: 1})
    history.add(0, 0, o)
    history.add(0, 2, o)
    history.add(1, 0, o)
    known = {client: history.known_to(client, o, 3) for client in (0, 1, 2, None)}
    assert {client: (len(o.earlier), o.unseen) for client, o in known.items()} == {
        0: (2, 1), 1: (1, 0), 2: (0, 0), None: (0, 0),
    }  # fmt: skip


def test_without_earlier_rounds_it_is_the_attack_itself() -> None:
    attack = inverting_gradients(steps=3)
    joint = dataclasses.replace(attack, rounds="joint")
    a = joint.reconstruct_many(P.observations, P.victim, seeds=[0, 1])
    b = attack.reconstruct_many(P.observations, P.victim, seeds=[0, 1])
    assert all(torch.equal(x.inputs, y.inputs) for x, y in zip(a, b, strict=True))


def test_error_feedback_gives_the_sum_away_round_by_round() -> None:
    gradient = P.observations[0].update
    client = Client(P.victim, P.observations[0].params, {}, Batch(P.images[:1], P.labels[:1], torch.ones(1, 2)))

    def shown(rounds: int, feedback: bool) -> float:
        """The relative error of the mean of what was sent."""
        defense = DGP(k1=0.05, k2=0.75)
        if not feedback:
            defense = dataclasses.replace(
                defense, error_feedback=dataclasses.replace(defense.error_feedback, enabled=False)
            )
        state, total = defense.init_client(gradient), {k: torch.zeros_like(v) for k, v in gradient.items()}
        for _ in range(rounds):
            sent, state = defense.protect(gradient, client, state, {}, {})
            total = {k: v + sent[k] for k, v in total.items()}
        return _norm({k: v / rounds - gradient[k] for k, v in total.items()}) / _norm(gradient)

    assert shown(30, True) < shown(5, True) < shown(1, True)
    assert shown(30, False) == pytest.approx(shown(1, False), rel=1e-4)


def _norm(update: Update) -> float:
    return float(torch.stack([u.square().sum() for u in update.values()]).sum().sqrt())


def test_what_was_seen_survives_a_checkpoint() -> None:
    first, second, local = History(), History(), FedAvg(learning_rate=0.1, milestones=[2], gamma=0.5)
    seen = [dataclasses.replace(o, labels=y, local=local.at(0)) for o, y in zip(P.observations, P.labels, strict=True)]
    for r in (3, 1):
        for client, o in enumerate(seen):
            first.add(client, r, dataclasses.replace(o, local=local.at(r)))
    file = io.BytesIO()
    torch.save(first.pack(), file)
    file.seek(0)
    second.unpack(torch.load(file, weights_only=True), seen[0], local)
    for client in (0, 1):
        rounds = second.before(client, 5)
        assert [o.local.learning_rate for o in rounds if o.local] == pytest.approx([0.1, 0.05])
        for old, new in zip(first.before(client, 5), rounds, strict=True):
            torch.testing.assert_close(dict(old.update), dict(new.update))
            assert old.labels is not None and new.labels is not None and torch.equal(old.labels, new.labels)
    # one batch of victims, as before: their model is the same object
    a, b = (second.before(client, 5)[0] for client in (0, 1))
    assert a.local is b.local
    assert all(a.params[k] is b.params[k] for k in a.params)
    assert second.before(0, 3) == second.before(0, 2)


@pytest.mark.parametrize("threat", ["curious_server", "adaptive"])
def test_a_run_attacks_rounds_jointly_and_says_what_it_had_to_go_on(threat: str, tmp_path: Path) -> None:
    """Round 1 is not attacked, so that he who knows the defense has no exact sums and takes all entries too."""
    settings: list[Any] = [
        *SMALL, "attack=[inverting_gradients_joint]", "attack.inverting_gradients_joint.steps=2",
        f"threat={threat}", "defense=dgp", "fl.attack_rounds=[0,2]", "fl.local.batch_size=null",
        "partition.samples_per_client=2",
    ]  # fmt: skip
    done = gia_bench(tmp_path, *[s for s in settings if "inverting_gradients_fast" not in s])
    assert done.status == 0, done.err
    frame = pd.concat([pd.read_json(p, lines=True) for p in tmp_path.rglob("records.jsonl")])
    equations = frame[frame.metric == "equations"].set_index("round")["value"]
    unknowns = frame[frame.metric == "unknowns"].set_index("round")["value"]
    numbers = frame[frame.metric == "dense_uplink_bytes"]["value"].max() / 4
    assert 1.05 * equations[0] < equations[2] <= numbers, "the sum of two rounds has hardly more entries than one"
    assert unknowns[0] == unknowns[2] == 2 * 16 * 16
