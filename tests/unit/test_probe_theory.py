"""The theory probe on numbers worked out by hand, and on what real rounds sent."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import nn

from gia_bench.data.cohort import Cohort
from gia_bench.data.source import InMemory
from gia_bench.defenses.base import Defense
from gia_bench.defenses.chain import Chain
from gia_bench.defenses.clip import ClipUpdate
from gia_bench.defenses.dgp import DGP
from gia_bench.defenses.dp_sgd import DPSGD
from gia_bench.defenses.feedback import ErrorFeedback
from gia_bench.defenses.none import NoDefense
from gia_bench.defenses.outpost import Outpost
from gia_bench.defenses.top_k import TopK
from gia_bench.federated.execution import Loop, Vmap
from gia_bench.federated.local import FedAvg, FedSGD
from gia_bench.federated.round import Round, play_round
from gia_bench.federated.rules import Rules, Server
from gia_bench.federated.work import LocalWork
from gia_bench.models.functional import Victim
from gia_bench.probes.theory import measure, shares, undefended
from gia_bench.seeding import seeded, stream

OFF = ErrorFeedback(enabled=False)
OBSERVED = (1, 2)


def test_the_numbers_of_a_small_update_are_those_worked_out_by_hand() -> None:
    # 20 entries: the largest one is 5 %, the next four are kept, 15 zeros and ones are 75 %; and a tensor of 4 entries,
    # of which DGP drops none at the top and three at the bottom
    a = torch.tensor([10.0, -4.0, 3.0, 2.0, 2.0] + [1.0] * 6 + [0.0] * 9)
    update = {"a": a, "b": torch.tensor([[3.0, -1], [0, 2]])}
    whole = 100 + 16 + 9 + 4 + 4 + 6 + 9 + 1 + 4
    sent = {"a": update["a"].clone(), "b": update["b"] + 1}
    sent["a"][0] = 0
    got = measure(update, sent)
    assert got.relative_gradient_distance == pytest.approx(math.sqrt((100 + 4) / whole))
    assert got.energy_top_k1 == pytest.approx(100 / whole)
    assert got.energy_bottom_k2 == pytest.approx((6 + 1 + 4) / whole)


def test_an_update_sent_as_it_is_has_distance_zero_and_one_not_sent_at_all_has_one() -> None:
    update = {"w": torch.randn(50, generator=stream(0))}
    assert measure(update, update).relative_gradient_distance == 0
    assert measure(update, {"w": torch.zeros(50)}).relative_gradient_distance == 1
    assert all(math.isnan(v) for v in measure({"w": torch.zeros(50)}, update))


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_the_distance_of_top_k_is_the_root_of_the_energy_it_does_not_keep(scope: str) -> None:
    g = stream(1)
    update = {"w": torch.randn(13, 7, generator=g), "b": torch.randn(13, generator=g)}
    defense = TopK(keep=0.2, scope=scope, error_feedback=OFF)
    sent = {k: torch.where(mask, update[k], 0) for k, mask in defense.select(update).items()}
    kept = sum(float(s.double().square().sum()) for s in sent.values())
    whole = sum(float(u.double().square().sum()) for u in update.values())
    assert measure(update, sent).relative_gradient_distance == pytest.approx(math.sqrt(1 - kept / whole))


@pytest.mark.parametrize(("k1", "k2"), [(0.05, 0.75), (0.0, 0.75), (0.3, 0.3)])
def test_what_dgp_drops_is_the_energy_at_the_top_and_at_the_bottom(k1: float, k2: float) -> None:
    g = stream(2)
    update = {"w": torch.randn(13, 7, generator=g), "b": torch.randn(3, generator=g), "s": torch.randn((), generator=g)}
    sent, _ = DGP(k1=k1, k2=k2, error_feedback=OFF).protect(update, None, {}, {}, {})  # type: ignore[arg-type]
    got = measure(update, sent, k1, k2)
    assert got.relative_gradient_distance**2 == pytest.approx(got.energy_top_k1 + got.energy_bottom_k2)


def victim() -> Victim:
    with seeded(0, "test model"):
        module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 36, 3))
    return Victim(module=module, input_shape=(1, 8, 8), num_classes=3)


def cohort(local: LocalWork) -> Cohort:
    g, sizes = stream(0, "test images"), (6, 8, 5)
    source = InMemory(torch.rand(sum(sizes), 1, 8, 8, generator=g), torch.randint(3, (sum(sizes),), generator=g))
    owned = torch.split(torch.arange(sum(sizes)), list(sizes))
    steps = [local.schedule(n, 0, 0, c) for c, n in enumerate(sizes)]
    return Cohort(
        round_index=0, clients=(0, 1, 2), weights=sizes, source=source,
        steps=tuple(tuple(own[p] for p in chosen) for own, chosen in zip(owned, steps, strict=True)),
    )  # fmt: skip


LOCALS: dict[str, LocalWork] = {"sgd": FedSGD(batch_size=4), "avg": FedAvg(batch_size=3, epochs=2)}


def play(defense: Defense, local: LocalWork, rules: Rules) -> Round:
    rules = dataclasses.replace(rules, defense=defense)
    server = Server(*rules.victim.initial(), defense.init_server(rules.victim.initial()[0]))
    return play_round(rules, server, {}, cohort(local), observed=OBSERVED)


@pytest.mark.parametrize("name", LOCALS)
@pytest.mark.parametrize("defense", [NoDefense(), DGP(), DPSGD(), Outpost(beta=0)], ids=lambda d: type(d).__name__)
def test_a_clients_own_update_is_what_the_undefended_round_sends_whatever_the_defense_does_while_it_trains(
    defense: Defense, name: str
) -> None:
    local = LOCALS[name]
    rules = Rules(victim=victim(), defense=defense, local=local, executor=Vmap(), seed=3)
    plain, played = play(NoDefense(), local, rules), play(defense, local, rules)
    assert plain.transcript is not None and played.transcript is not None
    for executor in (Vmap(), Loop()):
        for client in OBSERVED:
            with_executor = dataclasses.replace(rules, executor=executor)
            own = undefended(with_executor, played.transcript, cohort(local), client)
            for k, g in plain.transcript.updates[client].items():
                torch.testing.assert_close(own[k], g, rtol=1e-4, atol=1e-6)
            distance = measure(own, played.transcript.updates[client]).relative_gradient_distance
            assert (distance < 1e-5) == isinstance(defense, NoDefense)


def test_the_energies_are_of_the_shares_that_the_run_itself_drops() -> None:
    own = DGP(k1=0.1, k2=0.5)
    assert shares(own) == shares(Chain(stages={"clip": ClipUpdate(), "prune": own})) == (0.1, 0.5)
    assert shares(TopK()) == (0.05, 0.75)
