"""What the privacy probe records: the accountants' numbers for what the clients really did."""

from __future__ import annotations

import math
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from opacus.accountants import create_accountant
from torch import nn

from gia_bench.data.datamodule import FederatedDataModule
from gia_bench.data.partition import Partition
from gia_bench.data.source import Dataset, InMemory
from gia_bench.defenses.base import Defense
from gia_bench.defenses.chain import Chain
from gia_bench.defenses.client_dp import ClientDP
from gia_bench.defenses.clip import ClipUpdate
from gia_bench.defenses.dp_accounting import epsilon
from gia_bench.defenses.dp_sgd import DPSGD
from gia_bench.defenses.none import NoDefense
from gia_bench.federated.execution import Vmap
from gia_bench.federated.local import FedAvg, FedSGD
from gia_bench.federated.module import FederatedModule
from gia_bench.federated.rules import Rules
from gia_bench.federated.schedule import Schedule, ServerOptimizer
from gia_bench.federated.work import LocalWork
from gia_bench.models.functional import Victim
from gia_bench.probes.privacy import PrivacyProbe, Spending, accounted, worst
from gia_bench.pruning.none import NoPruning
from gia_bench.pruning.pruned import Pruned

SIZES = (40, 80, 20, 60)
NOMINAL = "delta=1e-05, nominal: batches are shuffled (fl.local.sampling=poisson draws them as the accountant assumes)"
ANY: Any = None


class Recorded:
    def __init__(self) -> None:
        self.lines: list[tuple[str, float | None, dict[str, Any]]] = []

    def add(self, metric: str, value: float | None, **place: Any) -> None:
        self.lines.append((metric, value, place))


class Run:
    """Rounds without their training: only who plays, and with what."""

    def __init__(
        self, defense: Defense, local: LocalWork, *, clients_per_round: int | None = None, weighting: str = "examples"
    ) -> None:
        source = InMemory(torch.zeros(sum(SIZES), 1, 2, 2), torch.zeros(sum(SIZES), dtype=torch.int64))
        dataset = Dataset(
            name="made", version="0", train=source, test=source, num_classes=2, shape=(1, 2, 2), mean=(0.0,), std=(1.0,)
        )
        partition = Partition(clients=torch.split(torch.arange(sum(SIZES)), list(SIZES)))
        self.data = FederatedDataModule(
            dataset=dataset, partition=partition, local=local, clients_per_round=clients_per_round, seed=0
        )
        module = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
        victim = Victim(module=module, input_shape=(1, 2, 2), num_classes=2)
        rules = Rules(victim=victim, defense=defense, local=local, executor=Vmap(), seed=0, weighting=weighting)
        schedule = Schedule(
            rounds=99, local=local, executor=Vmap(),
            server=ServerOptimizer(optimizer=lambda p: torch.optim.SGD(p, lr=0.1)),
        )  # fmt: skip
        self.module = FederatedModule(rules, schedule, 2)
        self.recorded = Recorded()
        self.probe = PrivacyProbe(self.recorded, self.data)  # type: ignore[arg-type]

    def play(self, rounds: range, dropped: tuple[int, ...] = ()) -> None:
        for r in rounds:
            outputs = {"report": SimpleNamespace(dropped=dropped)}
            self.probe.on_train_batch_end(ANY, self.module, outputs, self.data.cohort(r), r)
            self.module.round_index = r + 1

    def measure(self) -> dict[str, tuple[float | None, str | None]]:
        self.recorded.lines.clear()
        self.probe.on_validation_epoch_end(ANY, self.module)
        assert all(place["round"] == self.module.round_index - 1 for _, _, place in self.recorded.lines)
        return {metric: (value, place.get("reason")) for metric, value, place in self.recorded.lines}


def spent(sigma: float, rate: float, steps: int, accountant: str = "rdp") -> float:
    return epsilon(noise_multiplier=sigma, sample_rate=rate, num_steps=steps, delta=1e-5, accountant=accountant).epsilon


def test_a_defense_without_a_budget_records_none() -> None:
    for defense in (NoDefense(), ClipUpdate()):
        run = Run(defense, FedSGD(batch_size=4))
        run.play(range(3))
        assert run.measure() == {}


@pytest.mark.parametrize("accountant", ["rdp", "prv"])
def test_dp_sgd_spends_one_step_a_round_at_the_rate_of_the_client_with_the_fewest_examples(accountant: str) -> None:
    run = Run(DPSGD(noise_multiplier=2.0, accountant=accountant), FedSGD(batch_size=4))
    run.play(range(5))
    first = run.measure()
    run.play(range(5, 10))
    assert first == {f"example_epsilon_{accountant}": (spent(2.0, 4 / 20, 5, accountant), NOMINAL)}
    assert run.measure()[f"example_epsilon_{accountant}"][0] == spent(2.0, 4 / 20, 10, accountant)


def test_local_steps_count_one_by_one_and_whole_batches_are_not_nominal() -> None:
    # two passes in steps of 10: the client with 80 examples takes 16 of them at 1/8, that with 20 takes 4 at 1/2
    run = Run(DPSGD(noise_multiplier=3.0), FedAvg(epochs=2, batch_size=10))
    run.play(range(1))
    steps = {s: spent(3.0, 10 / s, 2 * s // 10) for s in SIZES}
    assert run.measure()["example_epsilon_rdp"][0] == max(steps.values())
    run = Run(DPSGD(noise_multiplier=3.0), FedSGD(batch_size=None))
    run.play(range(2))
    assert run.measure()["example_epsilon_rdp"] == (spent(3.0, 1.0, 2), "delta=1e-05")


@pytest.mark.parametrize("accountant", ["rdp", "prv"])
@pytest.mark.parametrize("steps", [1, 3])
def test_poisson_batches_spend_what_opacus_says_and_nothing_about_it_is_nominal(steps: int, accountant: str) -> None:
    local = FedAvg(epochs=None, steps=3, batch_size=2, sampling="poisson")
    run = Run(
        DPSGD(noise_multiplier=2.0, accountant=accountant),
        local if steps > 1 else FedSGD(batch_size=2, sampling="poisson"),
    )
    run.play(range(5))
    counts = [n for r in range(5) for own in run.data.cohort(r).counts for n in own]
    assert 0 in counts and max(counts) > 2  # neither an empty step nor a large one changes what is spent
    ledger = create_accountant(accountant)
    for _ in range(5 * steps):
        ledger.step(noise_multiplier=2.0, sample_rate=2 / min(SIZES))
    expected = ledger.get_epsilon(delta=1e-5)
    assert run.measure() == {f"example_epsilon_{accountant}": (pytest.approx(expected), "delta=1e-05")}


def test_poisson_batches_beside_other_stages_are_nominal_for_these_alone() -> None:
    chain = Chain(stages={"dp": DPSGD(noise_multiplier=4.0), "clip": ClipUpdate()})
    run = Run(chain, FedSGD(batch_size=4, sampling="poisson"))
    run.play(range(2))
    _, remark = run.measure()["example_epsilon_rdp"]
    assert remark == "delta=1e-05, nominal: other stages are left out of account"
    run = Run(Chain(stages={"dp": DPSGD(noise_multiplier=4.0), "clip": ClipUpdate()}), FedSGD(batch_size=4))
    run.play(range(2))
    assert run.measure()["example_epsilon_rdp"][1] == f"{NOMINAL}; other stages are left out of account"


def test_rounds_in_which_a_client_does_not_play_cost_it_nothing() -> None:
    run = Run(DPSGD(noise_multiplier=2.0), FedSGD(batch_size=4), clients_per_round=1)
    run.play(range(12))
    played = [run.data.cohort(r).clients[0] for r in range(12)]
    assert len(set(played)) == len(SIZES)
    each = [spent(2.0, 4 / SIZES[c], played.count(c)) for c in set(played)]
    assert run.measure()["example_epsilon_rdp"][0] == max(each) < spent(2.0, 4 / 20, 12)


@pytest.mark.parametrize("weighting", ["uniform", "examples"])
def test_client_dp_has_a_budget_before_the_server_and_one_before_those_who_see_the_models(weighting: str) -> None:
    run = Run(ClientDP(noise_multiplier=4.0), FedAvg(batch_size=10), clients_per_round=2, weighting=weighting)
    run.play(range(6))
    cohorts = [run.data.cohort(r) for r in range(6)]
    most = max(sum(c in cohort.clients for cohort in cohorts) for c in range(len(SIZES)))
    # the noise of both clients against what the heavier one can change
    pairs = [[SIZES[c] if weighting == "examples" else 1 for c in cohort.clients] for cohort in cohorts]
    gain = min(math.hypot(*pair) / max(pair) for pair in pairs)
    got = run.measure()
    assert got["client_local_epsilon_rdp"] == (spent(4.0, 1.0, most), "delta=1e-05")
    value, remark = got["client_epsilon_rdp"]
    assert value == pytest.approx(spent(4.0 * gain, 2 / 4, 6))
    assert remark == "delta=1e-05, nominal: a round has a fixed number of clients"


def test_a_dropped_client_adds_no_noise_to_the_mean() -> None:
    run = Run(ClientDP(noise_multiplier=4.0), FedSGD(batch_size=4), weighting="uniform")
    run.play(range(1), dropped=(0, 2, 3))
    assert run.measure()["client_epsilon_rdp"][0] == pytest.approx(spent(4.0, 1.0, 1))


def test_a_stage_of_a_chain_is_accounted_and_called_nominal() -> None:
    chain = Chain(stages={"clip": ClipUpdate(), "dp": ClientDP(noise_multiplier=4.0)})
    run = Run(chain, FedSGD(batch_size=4))
    run.play(range(2))
    assert run.measure()["client_local_epsilon_rdp"] == (
        spent(4.0, 1.0, 2), "delta=1e-05, nominal: other stages are left out of account",
    )  # fmt: skip


def test_no_noise_and_no_opacus_are_recorded_as_unavailable_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(DPSGD(noise_multiplier=0), FedSGD(batch_size=4))
    run.play(range(2))
    value, reason = run.measure()["example_epsilon_rdp"]
    assert value is None and reason is not None and "without noise there is no budget" in reason
    assert run.recorded.lines[0][2]["status"] == "unavailable"
    run = Run(DPSGD(), FedSGD(batch_size=4))
    run.play(range(2))
    monkeypatch.setitem(sys.modules, "opacus.accountants", None)
    value, reason = run.measure()["example_epsilon_rdp"]
    assert value is None and reason is not None and "pip install opacus" in reason


def test_a_resumed_run_counts_on_from_its_checkpoint() -> None:
    defense, local = ClientDP(noise_multiplier=4.0), FedSGD(batch_size=4)
    whole, first, second = (Run(defense, local, clients_per_round=2) for _ in "abc")
    whole.play(range(8))
    first.play(range(5))
    second.probe.load_state_dict(first.probe.state_dict())
    second.play(range(5, 8))
    assert second.measure() == whole.measure()


def test_only_spendings_that_no_other_exceeds_are_computed() -> None:
    def one(rate: float, steps: int) -> Spending:
        return Spending(1.0, rate, steps)

    assert worst({one(0.5, 3), one(0.5, 7), one(0.2, 7), one(0.2, 9), one(0.1, 8)}) == [one(0.5, 7), one(0.2, 9)]


def test_a_budget_is_found_inside_a_pruned_chain_and_called_nominal() -> None:
    private = DPSGD(max_grad_norm=1.0, noise_multiplier=1.0)
    assert [alone for _, alone in accounted(private)] == [True]
    wrapped = Pruned(inner=Chain(stages={"dp": private, "clip": ClipUpdate(max_norm=1.0)}), method=NoPruning())
    assert accounted(wrapped) == [(private.mechanism, False)]
