"""Poisson batches: every example is in by itself, nothing depends on who was, and an empty batch is one too."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from command import SMALL, gia_bench
from torch import Tensor, nn

from gia_bench.compatibility import check_sampling
from gia_bench.data.cohort import Cohort
from gia_bench.data.datamodule import FederatedDataModule
from gia_bench.data.partition import Partition
from gia_bench.data.source import Dataset, InMemory
from gia_bench.defenses.base import Defense
from gia_bench.defenses.chain import Chain
from gia_bench.defenses.dp_sgd import DPSGD
from gia_bench.defenses.mixup import MixUp
from gia_bench.defenses.none import NoDefense
from gia_bench.errors import ConfigError, IncompatibleError
from gia_bench.federated.execution import Executor, Loop, Vmap
from gia_bench.federated.local import FedAvg, FedSGD
from gia_bench.federated.round import Round, play_round
from gia_bench.federated.rules import Rules, Server
from gia_bench.federated.sampling import expected_examples
from gia_bench.federated.work import LocalWork
from gia_bench.models.functional import Victim
from gia_bench.seeding import seeded, stream
from gia_bench.values import Batch, Params, Update

HELD, EXPECTED = 10, 4
ONE = FedSGD(batch_size=EXPECTED, sampling="poisson")
SEVERAL = FedAvg(
    learning_rate=0.2, epochs=None, steps=3, batch_size=EXPECTED, momentum=0.9, weight_decay=0.01, sampling="poisson"
)
LOCALS: dict[str, LocalWork] = {"fedsgd": ONE, "fedavg": SEVERAL}
STEPS: list[list[list[int]]] = [[[], [3], [0, 1]], [[0, 1, 2, 3, 4], [], []], [[7, 8], [1, 2, 3], [9]]]
"""Positions of three clients' steps, some of them empty; work of one step takes the first of each."""


@pytest.fixture(scope="module")
def model() -> Victim:
    with seeded(0, "model"):
        network = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(3 * 36, 3)).double()
    return Victim(module=network, input_shape=(1, 8, 8), num_classes=3)


@dataclasses.dataclass(frozen=True)
class Doubled:
    """The same images in float64, so that equality is a matter of mathematics and not of rounding."""

    source: InMemory
    groups = None

    @property
    def labels(self) -> Tensor:
        return self.source.labels

    def __len__(self) -> int:
        return len(self.source)

    def images(self, indices: Tensor) -> Tensor:
        return self.source.images(indices).double()


def pictures() -> InMemory:
    g = stream(0, "pictures")
    total = HELD * len(STEPS)
    return InMemory(torch.rand(total, 1, 8, 8, generator=g), torch.randint(3, (total,), generator=g))


def cohort(local: LocalWork, steps: list[list[list[int]]] = STEPS) -> Cohort:
    number = len(local.schedule(HELD, 0, 0, 0))
    chosen = [[torch.tensor(s, dtype=torch.int64) for s in own[:number]] for own in steps]
    return Cohort(
        round_index=0, clients=tuple(range(len(steps))), source=Doubled(pictures()),
        steps=tuple(tuple(HELD * c + s for s in own) for c, own in enumerate(chosen)),
        weights=tuple(local.weight(HELD, own) for own in chosen),
    )  # fmt: skip


def play(
    model: Victim, local: LocalWork, defense: Defense, executor: Executor, steps: list[list[list[int]]] = STEPS
) -> Round:
    rules = Rules(victim=model, defense=defense, local=local, executor=executor, seed=0)
    params, buffers = model.initial()
    return play_round(rules, Server(params, buffers, {}), {}, cohort(local, steps), observed=(0, 1, 2))


def row(own: Cohort, client: int) -> Batch:
    """One client's batches [S, B, ...]."""
    return Batch(*(t[0] for t in own.batch([client])))


@pytest.mark.parametrize("local", LOCALS.values(), ids=LOCALS)
def test_every_example_is_in_with_the_stated_chance_whoever_else_is(local: LocalWork) -> None:
    drawn = torch.zeros(2000, HELD)
    for r in range(len(drawn)):
        for step in local.schedule(HELD, 0, r, 5)[:1]:
            assert step.dtype == torch.int64 and len(set(step.tolist())) == len(step)
            drawn[r, step] = 1
    rate = EXPECTED / HELD
    assert local.poisson_rate(HELD) == rate
    deviation = math.sqrt(rate * (1 - rate) / len(drawn))
    assert (drawn.mean(0) - rate).abs().max() < 4 * deviation
    together = drawn.T.corrcoef() - torch.eye(HELD)
    assert together.abs().max() < 4 / math.sqrt(len(drawn))
    # the sizes are binomial, so that none and all are possible
    sizes = drawn.sum(1)
    assert float(sizes.var()) == pytest.approx(HELD * rate * (1 - rate), rel=0.1)
    assert float((sizes == 0).double().mean()) == pytest.approx((1 - rate) ** HELD, abs=0.006)


@pytest.mark.parametrize("local", LOCALS.values(), ids=LOCALS)
def test_draws_are_pure_and_differ_between_rounds_clients_seeds_and_steps(local: LocalWork) -> None:
    def at(seed: int, r: int, client: int) -> list[list[int]]:
        return [step.tolist() for step in local.schedule(200, seed, r, client)]

    assert at(0, 3, 1) == at(0, 3, 1)
    others = [at(0, 3, 1), at(0, 4, 1), at(0, 3, 2), at(1, 3, 1)]
    every = [tuple(step) for own in others for step in own]
    assert len(set(every)) == len(every)
    assert [len(own) for own in others] == [len(local.schedule(HELD, 0, 0, 0))] * 4


def federation(local: LocalWork) -> FederatedDataModule:
    dataset = Dataset(
        name="made", version="0", train=pictures(), test=pictures(), num_classes=3, shape=(1, 8, 8), mean=(0.0,),
        std=(1.0,),
    )  # fmt: skip
    partition = Partition(clients=torch.split(torch.arange(HELD * 3), HELD))
    return FederatedDataModule(dataset=dataset, partition=partition, local=local, clients_per_round=2, seed=0)


def test_a_resumed_run_draws_the_same_cohorts() -> None:
    def begun(start: int) -> list[Any]:
        data = federation(ONE)
        data.start = start
        rounds = iter(data.train_dataloader())
        return [[s.tolist() for own in next(rounds).steps for s in own] for _ in range(6 - start)]

    assert begun(0)[4:] == begun(4)


@pytest.mark.parametrize("defense", [NoDefense(), DPSGD(max_grad_norm=0.5)], ids=["none", "dp_sgd"])
@pytest.mark.parametrize("local", LOCALS.values(), ids=LOCALS)
def test_a_loop_and_vmap_give_equal_rounds_with_empty_batches_among_them(
    model: Victim, local: LocalWork, defense: Defense
) -> None:
    alone = play(model, local, defense, Loop())
    for size in (1, 2, 16):
        together = play(model, local, defense, Vmap(chunk_size=size))
        assert alone.transcript is not None and together.transcript is not None
        torch.testing.assert_close(dict(together.aggregate), dict(alone.aggregate))
        torch.testing.assert_close(dict(together.transcript.updates), dict(alone.transcript.updates))
        assert together.loss == pytest.approx(alone.loss)
    assert math.isfinite(alone.loss)


def clipped_sum(model: Victim, params: Params, images: Tensor, labels: Tensor, bound: float) -> Update:
    """Example by example, with torch's own backward pass."""
    total = {k: torch.zeros_like(p) for k, p in params.items()}
    for image, label in zip(images, labels, strict=True):
        weights = {k: p.clone().requires_grad_() for k, p in params.items()}
        logits = torch.func.functional_call(model.module, weights, image[None])
        gradients = torch.autograd.grad(nn.functional.cross_entropy(logits, label[None]), list(weights.values()))
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
        for k, g in zip(params, gradients, strict=True):
            total[k] += g * min(1.0, bound / norm)
    return total


@pytest.mark.parametrize("sigma", [0.0, 2.0])
@pytest.mark.parametrize("local", LOCALS.values(), ids=LOCALS)
def test_dp_sgd_divides_the_noised_sum_by_the_expected_number_whatever_was_drawn(
    model: Victim, local: LocalWork, sigma: float
) -> None:
    """Against a naive loop: sums over examples, the noise of each step, torch's SGD."""
    bound = 0.3
    defense = DPSGD(max_grad_norm=bound, noise_multiplier=sigma)
    played = play(model, local, defense, Vmap())
    assert played.transcript is not None
    own = cohort(local)
    for client in own.clients:
        noise = defense.draw(model.initial()[0], row(own, client), stream(0, "noise", 0, client))
        params = {k: nn.Parameter(p.clone()) for k, p in model.initial()[0].items()}
        rate = (local.learning_rate, 0.9, 0.01) if isinstance(local, FedAvg) else (1.0, 0.0, 0.0)
        sgd = torch.optim.SGD(params.values(), lr=rate[0] or 0, momentum=rate[1], weight_decay=rate[2])
        for s, indices in enumerate(own.steps[client]):
            images, labels = own.source.images(indices), own.source.labels[indices]
            total = clipped_sum(model, {k: p.detach() for k, p in params.items()}, images, labels, bound)
            for k, p in params.items():
                p.grad = (total[k] + sigma * bound * noise[f"{s}.{k}"].double()) / EXPECTED
            sgd.step()
        expected = {k: p - params[k].detach() for k, p in model.initial()[0].items()}
        torch.testing.assert_close(dict(played.transcript.updates[client]), expected, rtol=1e-6, atol=1e-10)


def test_an_empty_batch_of_dp_sgd_sends_its_noise_and_weighs_as_much_as_any_other(model: Victim) -> None:
    defense = DPSGD(max_grad_norm=0.5, noise_multiplier=4.0)
    assert len(set(cohort(ONE).weights)) == 1 and cohort(ONE).weights[0] == EXPECTED
    played = play(model, ONE, defense, Loop())
    assert played.transcript is not None
    noise = torch.cat([u.flatten() for u in played.transcript.updates[0].values()])
    assert float(noise.std()) == pytest.approx(0.5 * 4.0 / EXPECTED, rel=0.1)
    mean = {k: sum(played.transcript.updates[c][k] for c in range(3)) / 3 for k in played.aggregate}
    torch.testing.assert_close(dict(played.aggregate), mean)


def test_without_a_defense_an_update_is_the_sum_over_the_expected_number_and_an_attacker_replays_it(
    model: Victim,
) -> None:
    params, buffers = model.initial()
    for local in (ONE, FedAvg(learning_rate=0.2, epochs=None, steps=1, batch_size=EXPECTED, sampling="poisson")):
        played = play(model, local, NoDefense(), Vmap())
        assert played.transcript is not None
        one = cohort(ONE)
        for client in (1, 2):
            batch = row(one, client)
            real = [t[0, : len(STEPS[client][0])] for t in batch]
            found = local.simulate(model, params, buffers, [Batch(*real)])
            torch.testing.assert_close(found, dict(played.transcript.updates[client]))
        assert all(not u.any() for u in played.transcript.updates[0].values())
        assert local.scale(2) == pytest.approx(2 / EXPECTED * (local.learning_rate or 1))


def test_of_several_steps_an_attacker_takes_each_on_all_examples() -> None:
    assert SEVERAL.plan(7) == [[slice(0, 7)]] * 3
    whole = dataclasses.replace(SEVERAL, batch_size=None, sampling="shuffled")
    assert SEVERAL.scale(7) == whole.scale(7)


def test_settings_that_make_no_sense_are_refused_with_the_way_out(model: Victim) -> None:
    with pytest.raises(ConfigError, match=r"sampling=.random. is not known. Choose one of: poisson, shuffled"):
        FedSGD(sampling="random")
    with pytest.raises(ConfigError, match=r"knows no passes.*fl.local.epochs=null fl.local.steps"):
        FedAvg(sampling="poisson")
    with pytest.raises(ConfigError, match="client 3 holds only 2 examples"):
        ONE.schedule(2, 0, 0, 3)
    coupled = dataclasses.replace(model, module=nn.Sequential(nn.BatchNorm2d(1), *model.module))
    with pytest.raises(IncompatibleError, match=r"BatchNorm in training mode.*GroupNorm.*model.training=false"):
        check_sampling(ONE, coupled)
    check_sampling(FedSGD(), coupled)
    check_sampling(ONE, dataclasses.replace(coupled, training=False))


@pytest.mark.parametrize("local", LOCALS.values(), ids=LOCALS)
def test_a_step_may_have_any_size_so_that_mixing_is_refused_when_a_run_is_composed(local: LocalWork) -> None:
    def sizes(local: LocalWork) -> frozenset[int]:
        return federation(local).step_sizes

    assert sizes(local) == frozenset(range(HELD + 1))
    with pytest.raises(IncompatibleError, match=r"a local step has 1 example\(s\), too few to mix"):
        Chain(stages={"mix": MixUp()}).check_steps(sizes(local))
    assert sizes(FedSGD(batch_size=None, sampling="poisson")) == {HELD}


def test_all_of_a_clients_data_is_all_of_it_under_either_sampling() -> None:
    both = [FedSGD(batch_size=None, sampling=sampling) for sampling in ("poisson", "shuffled")]
    assert all(sorted(local.schedule(HELD, 0, 0, 0)[0].tolist()) == list(range(HELD)) for local in both)
    assert {local.weight(HELD, []) for local in both} == {HELD} and both[0].scale(HELD) == both[1].scale(HELD) == 1


def test_a_run_records_a_budget_that_is_not_nominal_and_why_an_empty_batch_was_not_rebuilt(tmp_path: Path) -> None:
    done = gia_bench(
        tmp_path, *SMALL, "name=poisson", "fl.local.batch_size=1", "fl.local.sampling=poisson", "defense=dp_sgd",
        "threat=adaptive", "fl.attack_clients=4", "fl.attack_rounds=[0,1]", "attack.inverting_gradients_fast.steps=2",
    )  # fmt: skip
    assert done.status == 0, done.err
    [file] = tmp_path.rglob("records.jsonl")
    records = [json.loads(line) for line in file.read_text().splitlines()]
    budgets = [r for r in records if r["metric"] == "example_epsilon_rdp"]
    assert budgets and all(r["reason"] == "delta=1e-05" and r["value"] > 0 for r in budgets)
    quality = [r for r in records if r["metric"] == "psnr_db"]
    empty = {(r["round"], r["client"]) for r in quality if r["victim"] is None}
    rebuilt = {(r["round"], r["client"]) for r in quality if r["status"] == "ok"}
    assert empty and rebuilt and not empty & rebuilt and len(empty | rebuilt) == 8
    unavailable = [r for r in quality if r["status"] == "unavailable"]
    assert len(unavailable) == len(empty) and all("empty batch" in r["reason"] for r in unavailable)


def test_a_client_says_how_many_examples_are_expected_and_never_how_many_there_are() -> None:
    data = federation(ONE)
    cohorts = [data.cohort(index) for index in range(20)]
    assert len({n for cohort in cohorts for n in cohort.num_examples}) > 1
    assert {n for cohort in cohorts for n in cohort.said} == {ONE.batch_size}
    assert expected_examples(100, 0.1, 1) == 10 and expected_examples(100, 0.1, 2) == 19
    assert expected_examples(3, 1e-9, 1) == 1
