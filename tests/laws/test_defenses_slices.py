"""Slices of equal risk: every coordinate once, the right ones chosen, noise there and nowhere else."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from gia_bench.defenses.base import Client
from gia_bench.defenses.graddefense import GradDefense
from gia_bench.defenses.sensitivity import LayerSize
from gia_bench.defenses.slices import energies, equal_risk, reservoir, spread
from gia_bench.errors import IncompatibleError
from gia_bench.models.functional import Victim
from gia_bench.seeding import stream
from gia_bench.values import Params, Shared

ANY: Any = None  # what these calls do not look at
SIZES = LayerSize()


def announced(defense: GradDefense, params: Params, m: int = 1, round_index: int = 0) -> Shared:
    return defense.announce(params, defense.init_server(params), round_index, m, stream(0, "announce"), ANY)


def greedy(sizes: list[int], risk: list[float], count: int) -> list[int]:
    """The borders by a walk through single atoms: slice j ends where the risk reaches j + 1 shares."""
    atom = math.gcd(*sizes)
    borders, reached, share = [0], 0.0, sum(risk) / count
    place = 0
    for size, r in zip(sizes, risk, strict=True):
        for _ in range(size // atom):
            reached += r * atom / size
            place += atom
            if len(borders) < count and reached >= len(borders) * share * (1 - 1e-12):
                borders.append(place)
    return [*borders, sum(sizes)]


CASES = [([300, 12, 864, 12, 30, 6], 10), ([7, 5, 3], 4), ([51, 3], 1), ([400, 604], 7)]


@pytest.mark.parametrize(("sizes", "count"), CASES)
def test_borders_are_those_of_a_walk_through_single_atoms(sizes: list[int], count: int) -> None:
    risk = [float(r) for r in torch.rand(len(sizes), generator=stream(1)) * torch.tensor(sizes)]
    atom = math.gcd(*sizes)
    found = equal_risk(sizes, torch.tensor(risk, dtype=torch.float64), count)
    largest = max(r * atom / n for n, r in zip(sizes, risk, strict=True))
    assert largest < sum(risk) / count, "else the rule that no slice is empty decides"
    assert found.tolist() == greedy(sizes, risk, count)
    # once and only once: no gap, no overlap, nothing left over
    assert sum(int(n) for n in found.diff()) == sum(sizes)
    assert int(found[0]) == 0 and (found.diff() > 0).all() and (found % atom == 0).all()
    each = [r / n for n, r in zip(sizes, risk, strict=True) for _ in range(n)]
    for a, b in zip(found.tolist(), found.tolist()[1:], strict=False):
        assert abs(sum(each[a:b]) - sum(risk) / count) <= largest * (1 + 1e-9)


def test_slices_by_size_are_of_equal_size_up_to_one_atom() -> None:
    params = {"a": torch.zeros(30, 10), "b": torch.zeros(12), "c": torch.zeros(90)}
    shared = announced(GradDefense(risk=SIZES, slices=8), params)
    assert shared["borders"].tolist()[0] == 0 and int(shared["borders"][-1]) == 402
    assert (shared["borders"].diff() - 402 / 8).abs().max() <= math.gcd(300, 12, 90)


def test_equal_risk_by_hand_where_the_last_layer_has_none() -> None:
    # atoms of 2: 4 of risk 1 each, then 7 of risk 0, as the last layer under the sum of its gradient
    assert equal_risk([8, 14], torch.tensor([4.0, 0.0]), 4).tolist() == [0, 2, 4, 6, 22]
    # no risk at all: equal sizes, 11 atoms / 4
    assert equal_risk([8, 14], torch.zeros(2), 4).tolist() == [0, 6, 12, 18, 22]


def test_no_slice_is_empty_where_one_atom_holds_nearly_all_risk() -> None:
    for risk in ([1.0, 1e9, 1.0], [1e9, 1.0, 1.0], [0.0, 0.0, 1.0]):
        borders = equal_risk([6, 2, 6], torch.tensor(risk), 5)
        assert (borders.diff() > 0).all() and int(borders[0]) == 0 and int(borders[-1]) == 14


def test_a_common_divisor_of_one_costs_no_walk_and_a_too_large_one_is_refused_with_the_way_out() -> None:
    borders = equal_risk([10**9 + 7, 10**9 + 9], torch.tensor([1.0, 3.0]), 4)  # two thousand million atoms
    assert borders[2] == pytest.approx(10**9 + 7 + (10**9 + 9) / 3, abs=2)
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3, bias=False))
    victim = Victim(module=network, input_shape=(1, 2, 2), num_classes=3)
    with pytest.raises(IncompatibleError, match=r"common divisor 12, which leaves 1 atoms; lower defense\.slices"):
        GradDefense(slices=2).check_victim(victim)
    GradDefense(slices=1).check_victim(victim)


def test_spread_and_energies_agree_with_a_loop_over_coordinates() -> None:
    like = {"b": torch.zeros(2, 3), "a": torch.zeros(5)}
    borders = torch.tensor([0, 2, 7, 11])
    values = torch.tensor([10.0, 20.0, 30.0])
    row = torch.cat([t.reshape(-1) for t in spread(values, borders, like).values()])
    assert row.tolist() == [10, 10, 20, 20, 20, 20, 20, 30, 30, 30, 30]
    update = {"a": torch.arange(5.0), "b": torch.arange(6.0).view(2, 3)}  # another order than the model's
    assert energies(update, borders, like).tolist() == [1, 4 + 9 + 16 + 25 + 0, 1 + 4 + 9 + 16]


def test_every_set_of_slices_is_equally_likely() -> None:
    counts: dict[tuple[int, ...], int] = {}
    g, draws = stream(0), 1_500
    for _ in range(draws):
        mask = reservoir(4, 2, g)
        assert int(mask.sum()) == 2
        key = tuple(torch.nonzero(mask).view(-1).tolist())
        counts[key] = counts.get(key, 0) + 1
    expected = draws / 6
    assert len(counts) == 6
    assert sum((c - expected) ** 2 / expected for c in counts.values()) < 20.5  # chi-squared, 5 degrees, p = 0.001


CHOSEN = [(10, 0.3, 3), (10, 0.2, 2), (3, 0.2, 1), (100, 0.29, 29), (4, 1, 4)]


@pytest.mark.parametrize(("slices", "gamma", "d"), CHOSEN)
def test_the_number_of_chosen_slices_is_the_floor_and_at_least_one(slices: int, gamma: float, d: int) -> None:
    assert GradDefense(slices=slices, gamma=gamma).num_chosen == d


def test_noise_has_its_variance_on_the_chosen_slices_and_the_rest_keeps_its_bits() -> None:
    params = {"w": torch.zeros(200, 300), "b": torch.zeros(200)}
    defense = GradDefense(variance=0.04, gamma=0.3, slices=10, risk=SIZES)
    shared = announced(defense, params)
    noise = defense.draw(params, ANY, stream(3))
    update = {k: torch.randn(p.shape, generator=stream(4, k)) for k, p in params.items()}
    sent, _ = defense.protect(update, Client(ANY, params, {}, ANY), {}, shared, noise)
    difference = torch.cat([(sent[k] - update[k]).view(-1) for k in params])
    borders = shared["borders"].tolist()
    for j, chosen in enumerate(noise["chosen"].tolist()):
        part = difference[borders[j] : borders[j + 1]]
        if chosen:
            assert float(part.var()) == pytest.approx(0.04, rel=0.1)  # 6,000 draws: 1.8 %
            assert (part != 0).float().mean() > 0.99
        else:
            assert (part == 0).all()
    assert int(noise["chosen"].sum()) == 3
    again = defense.draw(params, ANY, stream(3))
    assert all(torch.equal(noise[k], again[k]) for k in noise)
    assert not all(torch.equal(noise[k], v) for k, v in defense.draw(params, ANY, stream(5)).items())
