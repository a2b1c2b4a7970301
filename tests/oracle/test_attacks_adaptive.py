"""Attackers who know the defense: what pruning withheld, and what noise is likely."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from attack_problems import Problem, problem
from torch import Tensor

from gia_bench.attacks.adaptive import Likelihood, Withheld
from gia_bench.attacks.distances import Cosine, Euclidean
from gia_bench.attacks.group import Group
from gia_bench.attacks.inverting_gradients import inverting_gradients
from gia_bench.attacks.scene import PixelSpace
from gia_bench.defenses.adgp import ADGP
from gia_bench.defenses.base import Client, Defense
from gia_bench.defenses.chain import Chain
from gia_bench.defenses.clip import ClipUpdate
from gia_bench.defenses.dgp import DGP
from gia_bench.defenses.grid import EDGE, ByChance
from gia_bench.defenses.noise import GaussianNoise, LaplaceNoise
from gia_bench.defenses.none import NoDefense
from gia_bench.defenses.precision import Int8
from gia_bench.defenses.quantize import QSGD
from gia_bench.defenses.top_k import TopK
from gia_bench.federated.local import FedAvg
from gia_bench.seeding import stream
from gia_bench.values import Batch, Observation, Update

PRUNING = {
    "dgp": DGP(k1=0.1, k2=0.6),
    "dgp_global": DGP(k1=0.1, k2=0.6, scope="global"),
    "top_k": TopK(keep=0.3),
    "top_k_global": TopK(keep=0.3, scope="global"),
    "clipped": Chain(stages={"clip": ClipUpdate(max_norm=0.5), "prune": DGP(k1=0.1, k2=0.6)}),
}


def updates(seed: int) -> Update:
    draw = torch.Generator().manual_seed(seed)
    return {k: torch.randn(n, generator=draw, dtype=torch.float64) for k, n in (("w", (6, 10)), ("b", (20,)))}


def protected(defense: Defense, update: Update, seed: int = 0) -> Observation:
    batch = Batch(torch.zeros(1, 1, 1, 4, 4), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1))
    noise = defense.draw(update, batch, stream(seed, "noise"))
    client = Client(problem(1).victim, update, {}, batch)
    sent, _ = defense.protect(update, client, defense.init_client(update), {}, noise)
    return Observation(params=update, update=sent, defense=defense)


def by_hand(dummy: list[float], seen: list[float], count: int) -> float:
    """Sorted in plain Python: the ``count`` largest missing entries lift to the largest seen, the rest sink."""
    sizes = [abs(s) for s in seen if s != 0]
    missing = sorted((abs(d) for d, s in zip(dummy, seen, strict=True) if s == 0), reverse=True)
    wrong = [max(max(sizes) - d, 0) for d in missing[:count]] + [max(d - min(sizes), 0) for d in missing[count:]]
    return math.fsum(w**2 for w in wrong)


@pytest.mark.parametrize("name", PRUNING)
def test_the_truth_violates_nothing_and_other_updates_do(name: str) -> None:
    defense = PRUNING[name]
    for seed in range(3):
        truth = updates(seed)
        observation = protected(defense, truth)
        assert float(defense.violation(truth, observation)) == pytest.approx(0, abs=1e-20)
        assert float(defense.violation(updates(seed + 10), observation)) > 1e-3
        assert float(defense.violation({k: 3 * v for k, v in truth.items()}, observation)) > 0 or name == "clipped"


@pytest.mark.parametrize("name", ["dgp", "dgp_global", "top_k", "top_k_global"])
def test_the_violation_is_a_sort_and_two_sums(name: str) -> None:
    defense = PRUNING[name]
    assert isinstance(defense, DGP | TopK)
    share = 0.1 if isinstance(defense, DGP) else 0.0
    dummy, observation = updates(7), protected(defense, updates(0))
    rows = [[k] for k in dummy] if defense.scope == "tensor" else [list(dummy)]
    expected = 0.0
    for names in rows:
        d, o = (torch.cat([u[k].flatten() for k in names]).tolist() for u in (dummy, observation.update))
        expected += by_hand(d, o, math.floor(share * len(d) + 1e-9))
    assert float(defense.violation(dummy, observation)) == pytest.approx(expected)


def test_a_small_case_by_hand() -> None:
    """Ten entries, DGP(0.2, 0.5): three were seen, 4, -3 and 2; two missing ones are at least 4, five at most 2."""
    seen = torch.tensor([4.0, -3.0, 2.0, 0, 0, 0, 0, 0, 0, 0])
    dummy = torch.tensor([9.0, 9.0, 9.0, -6.0, 3.5, -2.5, 2.0, 1.0, 0.0, 3.0])
    defense = DGP(k1=0.2, k2=0.5)
    found = defense.violation({"w": dummy}, Observation(params={}, update={"w": seen}))
    # the largest missing are 6 and 3.5, which lacks 0.5; of the others 3 and 2.5 are 1 and 0.5 too large
    assert float(found) == pytest.approx(0.25 + 1 + 0.25)
    nothing = Observation(params={}, update={"w": torch.zeros(10)})
    assert float(defense.violation({"w": dummy}, nothing)) == 0


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("name", PRUNING)
def test_the_penalty_has_the_slope_of_finite_differences_alone_and_mapped(name: str, relative: bool) -> None:
    defense, constraint = PRUNING[name], Withheld(weight=0.7, relative=relative)
    observation, many = protected(defense, updates(0)), [updates(s) for s in (5, 6)]

    def penalty(dummy: Update) -> Tensor:
        return constraint(dummy, observation, 2.0)

    stacked = {k: torch.stack([u[k] for u in many]) for k in many[0]}
    gradients, values = torch.func.vmap(torch.func.grad_and_value(penalty))(stacked)
    for row, dummy in enumerate(many):
        assert float(values[row]) == pytest.approx(float(penalty(dummy)))
        assert values[row] > 0
        for k, v in dummy.items():
            for i in (0, 3, 11, 17):
                moved = [{**dummy, k: v.clone()} for _ in range(2)]
                for sign, m in zip((1, -1), moved, strict=True):
                    m[k].view(-1)[i] += sign * 1e-6
                slope = float(penalty(moved[0]) - penalty(moved[1])) / 2e-6
                assert float(gradients[k][row].flatten()[i]) == pytest.approx(slope, rel=1e-4, abs=1e-7)


def test_the_penalty_is_in_the_units_of_the_euclidean_distance_or_blind_to_length() -> None:
    defense = DGP(k1=0.1, k2=0.6)
    dummy, observation = updates(5), protected(defense, updates(0))
    plain = Withheld(weight=1.0)
    assert float(plain(dummy, observation, 1.0)) == pytest.approx(float(defense.violation(dummy, observation)))
    assert float(plain(dummy, observation, 0.1)) == pytest.approx(100 * float(plain(dummy, observation, 1.0)))
    relative = Withheld(weight=1.0, relative=True)
    once, tenfold = (float(relative({k: s * v for k, v in dummy.items()}, observation, 1.0)) for s in (1, 10))
    assert once == pytest.approx(tenfold)
    assert float(relative({k: 5 * v for k, v in updates(0).items()}, observation, 1.0)) == pytest.approx(0, abs=1e-20)
    zero = {k: torch.zeros_like(v) for k, v in dummy.items()}
    assert all(g.isfinite().all() for g in torch.func.grad(relative)(zero, observation, 1.0).values())


@pytest.mark.parametrize("defense", [None, NoDefense(), ADGP(), GaussianNoise(scale=0.1)])
def test_where_nothing_is_known_of_what_is_missing_nothing_is_asked(defense: Defense | None) -> None:
    """Of ADGP the positions are the leader's: a client's own entries there may have any rank."""
    observation = Observation(params={}, update=updates(0), defense=defense)
    assert float(Withheld()(updates(1), observation, 1.0)) == 0


@pytest.mark.parametrize("defense", [GaussianNoise(scale=0.3), LaplaceNoise(scale=0.3), GaussianNoise(variance=0.04)])
def test_the_likelihood_is_the_noises_density(defense: Defense) -> None:
    """Differences of the surprise against differences of the log density, which scipy integrates to 1."""
    from scipy import stats

    a, b = updates(0), updates(1)
    law = defense.noise_law()
    assert law is not None
    family = stats.laplace(scale=0.3) if isinstance(defense, LaplaceNoise) else stats.norm(scale=defense.sigma)  # type: ignore[attr-defined]
    expected = sum(float(np.sum(family.logpdf(0) - family.logpdf(v.numpy()))) for v in a.values())
    nothing = {k: torch.zeros_like(v) for k, v in a.items()}
    assert float(law.surprise(a, nothing)) == pytest.approx(expected)
    seen = Observation(params={}, update=b, defense=defense)
    distance = Likelihood(otherwise=Cosine(), factor=0.1).informed(seen, 2.0)
    halved = [{k: v / 2 for k, v in u.items()} for u in (a, b)]
    assert float(distance(*halved)) == pytest.approx(0.1 * float(law.surprise(a, b)))
    assert float(distance(a, a)) == 0


BY_CHANCE = (QSGD(levels=3), Int8(rounding="stochastic"), Int8(rounding="stochastic", scope="global"))


@pytest.mark.parametrize("defense", BY_CHANCE, ids=repr)
def test_the_likelihood_of_stochastic_rounding_is_how_often_it_happens(defense: Defense) -> None:
    """One update sent 1,000 times: its entries' outcomes are as often as the law says, which sees one update."""
    update = {"w": torch.linspace(-1, 1, 30), "v": 0.1 * torch.linspace(-1, 1, 20).sin().view(4, 5)}
    law = defense.noise_law()
    assert law is not None
    sent = [protected(defense, update, seed=i).update for i in range(1000)]
    compared = 0
    for name, i in (("w", 3), ("w", 12), ("w", 20), ("v", 5), ("v", 13)):
        outcomes = torch.stack([s[name].flatten()[i] for s in sent])
        for outcome in outcomes.unique():
            often = float((outcomes == outcome).float().mean())
            if often < 0.1:  # near the edge of the law
                continue
            example = next(s for s in sent if s[name].flatten()[i] == outcome)
            own = {k: v.clone() for k, v in example.items()}  # all other entries as they were sent
            own[name].flatten()[i] = update[name].flatten()[i]
            assert math.exp(-float(law.surprise(own, example))) == pytest.approx(often, abs=0.06)
            compared += 1
    assert compared >= 5


SPARSE = {"w": torch.cat([torch.ones(1), 0.02 * torch.randn(4000, generator=stream(3, "sparse"))])}
"""Entries of a few hundredths of a unit: nearly all are rounded to zero, as of a real gradient under QSGD."""


@pytest.mark.parametrize("levels", [1, 3])
def test_of_a_sparse_update_no_shorter_or_longer_one_explains_the_rounding_better(levels: int) -> None:
    defense = QSGD(levels=levels)
    law, sent = defense.noise_law(), protected(defense, SPARSE).update
    assert law is not None and float((sent["w"] == 0).float().mean()) > 0.5
    surprise = {a: float(law.surprise({"w": a * SPARSE["w"]}, sent)) for a in (0.0, 0.3, 0.6, 1.0, 1.5)}
    assert min(surprise, key=surprise.__getitem__) == 1.0, surprise


def test_a_rare_rounding_surprises_by_how_rare_it_is() -> None:
    """One entry went up to one unit from 1, 2 and 50 hundredths of it."""
    law, sent = QSGD(levels=7).noise_law(), {"w": torch.tensor([1.0, 7.0])}
    assert law is not None
    for part in (0.01, 0.02, 0.5):
        nats = float(law.surprise({"w": torch.tensor([part, 7.0])}, sent))
        assert nats == pytest.approx(-math.log(part), rel=1e-4)


def test_stochastic_rounding_is_surprising_beyond_its_unit_and_silent_of_nothing() -> None:
    law = QSGD().noise_law()
    assert law is not None
    sent = {"w": torch.tensor([0.5, 0.0, -1.0]), "nothing": torch.zeros(2), "empty": torch.zeros(0)}
    far = torch.tensor(3.0, requires_grad=True)
    surprise = law.surprise(sent | {"w": torch.stack([far, *sent["w"][1:]])}, sent)
    surprise.backward()
    assert surprise.item() > -math.log(1 - EDGE)
    assert far.grad is not None and float(far.grad) == pytest.approx(1 / (1 - EDGE) / 0.5, rel=1e-4)
    assert float(law.surprise(sent | {"nothing": torch.ones(2)}, sent)) == 0
    assert float(ByChance(127, shared=True).surprise(sent, sent)) == 0
    mean = Observation(params={}, update=sent, num_clients=2)
    assert QSGD().noise_law(mean) is None and Int8().noise_law() is None
    assert Chain(stages={"a": QSGD(), "b": Int8(rounding="stochastic")}).noise_law() is None
    assert Chain(stages={"a": ClipUpdate(), "b": QSGD()}).noise_law() == law
    # what is rounded to 0 looks like what DGP withholds
    assert Chain(stages={"a": DGP(), "b": QSGD()}).noise_law() is None


def test_a_likelihood_without_known_noise_is_the_other_distance() -> None:
    a, b = updates(0), updates(1)
    two = Chain(stages={"one": GaussianNoise(scale=0.1), "two": LaplaceNoise(scale=0.1)})
    then_pruned = Chain(stages={"noise": GaussianNoise(scale=0.1), "prune": DGP()})
    for defense in (None, NoDefense(), DGP(), GaussianNoise(scale=0.0), LaplaceNoise(variance=0.0), two, then_pruned):
        seen = Observation(params={}, update=b, defense=defense)
        assert float(Likelihood(otherwise=Cosine()).informed(seen, 1.0)(a, b)) == float(Cosine()(a, b))
    clipped = Chain(stages={"clip": ClipUpdate(), "noise": GaussianNoise(scale=0.1)})
    assert clipped.noise_law() == GaussianNoise(scale=0.1).noise_law()


def seen_through(defense: Defense, victims: int = 3) -> Problem:
    p = problem(victims, dtype=torch.float64)
    sent = [protected(defense, o.update, seed=v).update for v, o in enumerate(p.observations)]
    seen = [dataclasses.replace(o, update=u, defense=defense) for o, u in zip(p.observations, sent, strict=True)]
    return dataclasses.replace(p, observations=seen)


def test_the_engine_adds_the_constraint_before_the_surrogate_and_asks_the_law_once() -> None:
    """At the truth both parts are zero; elsewhere the loss is the distance plus the penalty, victim by victim."""
    p = seen_through(DGP(k1=0.1, k2=0.6))
    space, constraint = PixelSpace.of(p.victim, p.images), {"withheld": Withheld(weight=0.5)}
    labels: list[Tensor | None] = list(p.labels)
    plain = Group.of(p.observations, p.victim, labels, space, Euclidean(), {}, None)
    group = Group.of(p.observations, p.victim, labels, space, Euclidean(), {}, None, constraint)
    assert group.evaluate({"pixels": p.images[:, None]})[0].abs().max() < 1e-20
    guess = torch.rand(p.images[:, None].shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found, distance = (g.evaluate({"pixels": guess})[0][:, 0] for g in (group, plain))
    for v, o in enumerate(p.observations):
        batch = Batch(guess[v, 0], p.labels[v], torch.ones(1, dtype=torch.float64))
        dummy = torch.func.grad(lambda w, o=o, batch=batch: p.victim.objective(w, o.buffers, batch)[0])(o.params)
        assert o.defense is not None
        assert float(found[v] - distance[v]) == pytest.approx(0.5 * float(o.defense.violation(dummy, o)))
    noisy = seen_through(GaussianNoise(scale=0.01))
    likely = Group.of(
        noisy.observations, p.victim, labels, space, Likelihood(otherwise=Cosine(), factor=1e-3), {}, None
    )
    euclid = Group.of(noisy.observations, p.victim, labels, space, Euclidean(), {}, None)
    ratio = likely.evaluate({"pixels": guess})[0] / euclid.evaluate({"pixels": guess})[0]
    torch.testing.assert_close(ratio, torch.full_like(ratio, 1e-3 / (2 * 0.01**2)))


def test_a_constraint_works_through_several_local_steps_too() -> None:
    local, defense = FedAvg(learning_rate=0.1, epochs=2, batch_size=None), DGP(k1=0.1, k2=0.6)
    p = problem(1, dtype=torch.float64)
    o = p.observations[0]
    batch = Batch(p.images[0], p.labels[0], torch.ones(1, dtype=torch.float64))
    update = local.simulate(p.victim, o.params, o.buffers, [batch])
    seen = dataclasses.replace(o, update=protected(defense, update).update, defense=defense, local=local)
    group = Group.of(
        [seen], p.victim, list(p.labels), PixelSpace.of(p.victim, p.images), Cosine(), {}, None,
        {"withheld": Withheld(weight=1.0, relative=True)},
    )  # fmt: skip
    assert group.evaluate({"pixels": p.images[:, None]})[0].abs().max() < 1e-12


def test_an_attacker_who_uses_the_constraint_ends_at_an_update_that_violates_less() -> None:
    p = seen_through(DGP(k1=0.1, k2=0.6))
    attack = inverting_gradients(steps=20, labels="idlg", distance=Euclidean(), priors={})
    asked = dataclasses.replace(attack, constraints={"withheld": Withheld(weight=1.0)})
    left = []
    for a in (attack, asked):
        for r, o in zip(a.reconstruct_many(p.observations, p.victim, seeds=[0, 1, 2]), p.observations, strict=True):
            assert r.labels is not None and o.defense is not None
            batch = Batch(r.inputs, r.labels, torch.ones(1, dtype=torch.float64))
            dummy = torch.func.grad(lambda w, o=o, batch=batch: p.victim.objective(w, o.buffers, batch)[0])(o.params)
            left.append(float(o.defense.violation(dummy, o)))
    assert sum(left[3:]) < sum(left[:3])
