"""PriPrune: what stays with a client, what is sent, and that nothing is lost between them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from command import gia_bench
from pruning_problems import images
from torch import Tensor, nn

from gia_bench.data.cohort import Cohort
from gia_bench.defenses.base import Client, Defense
from gia_bench.defenses.chain import Chain
from gia_bench.defenses.clip import ClipUpdate
from gia_bench.defenses.none import NoDefense
from gia_bench.defenses.priprune import WITHHELD, PriPrune
from gia_bench.defenses.priprune_masks import LOGITS, FixedRate, LearnedRates
from gia_bench.errors import ConfigError
from gia_bench.federated.execution import Executor, Loop, Vmap
from gia_bench.federated.local import FedAvg, FedSGD
from gia_bench.federated.round import Round, play_round
from gia_bench.federated.rules import Rules, Server
from gia_bench.federated.work import LocalWork
from gia_bench.models.functional import Victim
from gia_bench.pruning.feddst import FedDST
from gia_bench.pruning.pruned import with_pruning
from gia_bench.pruning.random_mask import RandomMask
from gia_bench.seeding import seeded, stream
from gia_bench.values import Batch, State, Update

SIZES = (7, 4, 6)
SGD, AVG = FedSGD(batch_size=4), FedAvg(epochs=1, batch_size=3, momentum=0.9, weight_decay=0.01)
LEARNED, FIXED = PriPrune(), PriPrune(mask=FixedRate())


def victim() -> Victim:
    with seeded(0, "test model"):
        module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, 3))
    return Victim(module=module, input_shape=(1, 6, 6), num_classes=3)


def cohort(local: LocalWork, round_index: int) -> Cohort:
    owned = torch.arange(sum(SIZES)).split(list(SIZES))
    chosen = [local.schedule(n, 0, round_index, c) for c, n in enumerate(SIZES)]
    return Cohort(
        round_index=round_index, clients=(0, 1, 2), source=images("private", sum(SIZES)), weights=SIZES,
        steps=tuple(tuple(own[p] for p in steps) for own, steps in zip(owned, chosen, strict=True)),
    )  # fmt: skip


def federation(
    defense: Defense, local: LocalWork, executor: Executor | None = None, rounds: int = 2
) -> Iterator[tuple[Server, Round, dict[int, State]]]:
    """(the server before a round, the round, the clients' states before it); the server takes steps of 0.5."""
    model = victim()
    defense = defense.calibrate(model, images("public", 40))
    rules = Rules(victim=model, defense=defense, local=local, executor=executor or Vmap(), seed=0)
    params, buffers = model.initial()
    params, state = defense.settle(params, defense.init_server(params))
    states: dict[int, State] = {}
    for r in range(rounds):
        server = Server(params, buffers, state)
        played = play_round(rules, server, states, cohort(local, r), observed=(0, 1, 2))
        yield server, played, states
        stepped = {k: p - 0.5 * played.aggregate[k] for k, p in params.items()}
        params, state = defense.settle(stepped, played.server_state)
        states = states | dict(played.states)


def sent_by(played: Round, client: int) -> Update:
    assert played.transcript is not None
    return dict(played.transcript.updates[client])


def local_change(server: Server, local: LocalWork, step: float, round_index: int, client: int, state: State) -> Update:
    """By a client's own hands: work from the broadcast less what it withheld, and the change since the broadcast."""
    held = {k: state[WITHHELD + k] if state else torch.zeros_like(p) for k, p in server.params.items()}
    own = {k: p - step * held[k] for k, p in server.params.items()}
    batch = cohort(local, round_index).batch([client])
    alone = Batch(*(t[0] for t in batch))
    counts = cohort(local, round_index).counts[client]
    result = local.run(victim(), NoDefense(), own, server.buffers, alone, {}, counts)
    return {k: held[k] + u for k, u in result.update.items()}


@pytest.mark.parametrize(("local", "step"), [(SGD, 0.1), (AVG, 1.0)], ids=["sgd", "avg"])
@pytest.mark.parametrize("defense", [FIXED, LEARNED], ids=["fixed", "learned"])
def test_what_is_sent_and_what_is_withheld_are_together_the_local_change_and_never_at_the_same_place(
    defense: Defense, local: LocalWork, step: float
) -> None:
    withheld = 0
    for r, (server, played, states) in enumerate(federation(defense, local, Loop())):
        for c in range(3):
            change = local_change(server, local, step, r, c, states.get(c, {}))
            for k, sent in sent_by(played, c).items():
                held = played.states[c][WITHHELD + k]
                assert not ((sent != 0) & (held != 0)).any()
                assert (sent[held != 0].view(torch.int32) == 0).all()  # plus zero: nothing travels
                torch.testing.assert_close(sent + held, change[k], rtol=1e-5, atol=1e-7)
                withheld += int((held != 0).sum())
    assert withheld > 0


def test_in_protect_itself_the_two_parts_are_the_whole_bit_for_bit() -> None:
    g, model = stream(3), victim()
    params, buffers = model.initial()
    update = {k: torch.randn(p.shape, generator=g) for k, p in params.items()}
    state = FIXED.init_client(params) | {WITHHELD + k: torch.randn(p.shape, generator=g) for k, p in params.items()}
    batch = Batch(torch.rand(1, 2, 1, 6, 6, generator=g), torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2))
    sent, after = FIXED.protect(update, Client(model, params, buffers, batch), state, {}, {})
    for k, u in update.items():
        assert torch.equal(sent[k] + after[WITHHELD + k], u + state[WITHHELD + k])


@pytest.mark.parametrize("local", [SGD, AVG], ids=["sgd", "avg"])
@pytest.mark.parametrize("mask", [FixedRate(rate=0), LearnedRates(rates=[0.0])], ids=["fixed", "learned"])
def test_at_rate_zero_every_round_is_the_undefended_one_bit_for_bit(
    mask: FixedRate | LearnedRates, local: LocalWork
) -> None:
    # alone: mapped, weights that may differ from client to client go through other kernels, which round otherwise
    runs = [federation(d, local, Loop()) for d in (PriPrune(mask=mask), NoDefense())]
    for (_, ours, _), (_, plain, _) in zip(*runs, strict=True):
        for c in range(3):
            for k, u in sent_by(plain, c).items():
                assert torch.equal(sent_by(ours, c)[k].view(torch.int32), u.view(torch.int32))


@pytest.mark.parametrize("local", [SGD, AVG], ids=["sgd", "avg"])
@pytest.mark.parametrize("sensitivity", ["update", "gradient"])
@pytest.mark.parametrize("mask", [FixedRate(scope="tensor"), LearnedRates()], ids=["fixed", "learned"])
def test_a_loop_and_vmap_withhold_the_same_entries(
    mask: FixedRate | LearnedRates, sensitivity: str, local: LocalWork
) -> None:
    defense = with_pruning(PriPrune(mask=mask, sensitivity=sensitivity), RandomMask(density=0.6))
    runs = [list(federation(defense, local, e)) for e in (Loop(), Vmap(chunk_size=2))]
    for (_, one, _), *others in zip(*runs, strict=True):
        for _, other, _ in others:
            for c in range(3):
                for k, u in sent_by(one, c).items():
                    torch.testing.assert_close(sent_by(other, c)[k], u, rtol=1e-4, atol=1e-6)
                    assert torch.equal(sent_by(other, c)[k] == 0, u == 0)


def test_at_its_next_round_a_client_trains_on_what_it_withheld() -> None:
    kept = list(federation(FIXED, AVG, Loop()))
    dropped = list(federation(PriPrune(mask=FixedRate(), pseudo_pruning=False), AVG, Loop()))
    (_, one, _), (_, other, _) = kept[0], dropped[0]
    assert all(torch.equal(v, sent_by(other, 0)[k]) for k, v in sent_by(one, 0).items())
    assert not any(name.startswith(WITHHELD) for name in other.states[0])
    (_, one, _), (_, other, _) = kept[1], dropped[1]
    assert any(not torch.equal(v, sent_by(other, 0)[k]) for k, v in sent_by(one, 0).items())


@pytest.mark.parametrize("method", [RandomMask(density=0.3), FedDST(density=0.3, interval=1, rounds=4)])
def test_around_a_base_pruning_the_rate_counts_what_that_one_kept(method: RandomMask | FedDST) -> None:
    for _, played, _ in federation(with_pruning(PriPrune(mask=FixedRate(rate=0.4)), method), AVG, rounds=1):
        for c in range(3):
            assert played.states[c]["pruning_rate"].item() == pytest.approx(0.4, abs=0.02)
            assert any((u != 0).any() for u in sent_by(played, c).values())


def test_in_a_chain_a_client_starts_from_what_it_withheld_there() -> None:
    defense = Chain(stages={"clip": ClipUpdate(max_norm=1e9), "priprune": FIXED})
    for (_, one, _), (_, other, _) in zip(federation(defense, AVG), federation(FIXED, AVG), strict=True):
        for k, v in sent_by(one, 1).items():
            torch.testing.assert_close(v, sent_by(other, 1)[k])


def test_fewer_bytes_travel_at_a_higher_rate() -> None:
    totals = []
    for rate in (0.0, 0.3, 0.9):
        [(_, played, _)] = federation(PriPrune(mask=FixedRate(rate=rate)), SGD, rounds=1)
        totals.append(sum(played.uplink_bytes.values()))
    assert totals[0] > totals[1] > totals[2]


def test_a_broken_client_is_seen_by_the_server() -> None:
    model = victim()
    params, buffers = model.initial()
    update: dict[str, Tensor] = {k: torch.ones_like(p) for k, p in params.items()}
    update["3.bias"][0], update["0.bias"][1] = torch.nan, torch.inf
    batch = Batch(torch.rand(1, 2, 1, 6, 6), torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2))
    sent, after = FIXED.protect(update, Client(model, params, buffers, batch), FIXED.init_client(params), {}, {})
    assert sent["3.bias"][0].isnan() and sent["0.bias"][1].isinf()
    assert all(v.isfinite().all() for v in after.values())


def learned(mask: LearnedRates) -> tuple[float, Tensor]:
    rates, logits = [], torch.zeros(0)
    for _, played, _ in federation(PriPrune(mask=mask), AVG, rounds=3):
        rates = [s["pruning_rate"].item() for s in played.states.values()]
        logits = played.states[0][LOGITS]
    return sum(rates) / len(rates), logits


def test_the_privacy_loss_alone_learns_the_highest_rate_and_the_sharing_loss_equal_ones() -> None:
    private, _ = learned(LearnedRates(lambda_acc=0, lambda_pri=1, lambda_sha=0))
    assert private > 0.4
    useful, _ = learned(LearnedRates(lambda_acc=1, lambda_pri=0, lambda_sha=0))
    assert useful < private
    _, logits = learned(LearnedRates(lambda_acc=0, lambda_pri=0, lambda_sha=1, steps=40))
    assert logits.argmax(1).diff().abs().max() <= 1


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: FixedRate(rate=1.0), "mask.rate"),
        (lambda: FixedRate(scope="layer"), "scope"),
        (lambda: LearnedRates(rates=[]), "ascending"),
        (lambda: LearnedRates(rates=[0.3, 0.1]), "ascending"),
        (lambda: LearnedRates(rates=[0.3, 1.0]), "mask.rates"),
        (lambda: LearnedRates(steps=0), "mask.steps"),
        (lambda: LearnedRates(temperature=0.0), "mask.temperature"),
        (lambda: LearnedRates(lambda_sha=-1.0), "mask.lambda_sha"),
        (lambda: PriPrune(sensitivity="weight"), "sensitivity"),
        (lambda: PriPrune(gradient_step=-0.1), "gradient_step"),
        (lambda: PriPrune(pseudo_pruning=1), "pseudo_pruning"),  # type: ignore[arg-type]
    ],
)
def test_a_setting_out_of_its_range_is_named(build: object, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        build()  # type: ignore[operator]


def test_a_run_records_the_learned_rate_the_share_sent_and_the_trend(tmp_path: Path) -> None:
    done = gia_bench(
        tmp_path, "dataset=digits", "model=mlp", "model.network.hidden=[16]", "partition.num_clients=3", "fl.rounds=1",
        "fl.eval_every=1", "attack=[]", "pruning=random", "defense=priprune",
    )  # fmt: skip
    assert done.status == 0, done.err
    [path] = tmp_path.rglob("records.jsonl")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    found = {r["metric"]: r["value"] for r in records}
    assert 0 <= found["defense_pruning_rate"] <= 0.5
    assert 0 < found["sent_share"] < 0.5 and found["leakage_trend_nats"] > 0
