"""What an attacker may choose by: laws of how probable a reconstruction is, and no truth in it."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from attack_problems import problem
from torch import Tensor

from gia_bench.attacks.evidence import EXACT, ROUGHNESS, improbability, misfit
from gia_bench.defenses.dgp import DGP
from gia_bench.defenses.noise import GaussianNoise
from gia_bench.seeding import stream
from gia_bench.values import Observation, Reconstruction, Update

P = problem(3, batch=2)
SEEN = P.observations[0]
RIGHT = Reconstruction(inputs=P.images[0], labels=P.labels[0], score=0.0)
FLAT = dataclasses.replace(RIGHT, inputs=torch.full_like(P.images[0], 0.5))
ENTRIES = sum(v.numel() for v in SEEN.update.values())


def rough(images: Tensor) -> float:
    """Two loops over neighbours: nats of images, by the formula in the docstring."""
    away = [
        abs(float(image[y + dy, x + dx]) - float(image[y, x]))
        for image in images.flatten(0, 1)
        for dy, dx in ((0, 1), (1, 0))
        for y in range(image.shape[0] - dy)
        for x in range(image.shape[1] - dx)
    ]
    return images.numel() * sum(away) / len(away) / ROUGHNESS


def halved(update: Update) -> Update:
    return {k: torch.where(u.abs() > u.abs().median(), u, 0.0) for k, u in update.items()}


def mixed(share: float) -> Reconstruction:
    """The truth and another image."""
    return dataclasses.replace(RIGHT, inputs=(1 - share) * P.images[0] + share * P.images[1])


def test_the_misfit_of_the_truth_is_zero_and_of_nothing_infinite() -> None:
    assert misfit(RIGHT, SEEN, P.victim) == pytest.approx(0, abs=1e-5)
    broken = dataclasses.replace(RIGHT, inputs=P.images[0] * math.nan)
    for nothing in (dataclasses.replace(RIGHT, failure="none"), broken):
        assert misfit(nothing, SEEN, P.victim) == improbability(nothing, SEEN, P.victim) == math.inf


def test_a_known_defense_is_part_of_the_misfit() -> None:
    pruned = dataclasses.replace(SEEN, update=halved(SEEN.update))
    assert misfit(RIGHT, dataclasses.replace(pruned, defense=DGP(k1=0.1, k2=0.5)), P.victim) == pytest.approx(
        0, abs=1e-5
    )
    assert misfit(RIGHT, pruned, P.victim) > 1e-4


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_numbers_weigh_by_the_log_of_the_distance_and_images_by_their_neighbours(share: float) -> None:
    guess, count = mixed(share), sum(int((u != 0).sum()) for u in SEEN.update.values())
    away = max(misfit(guess, SEEN, P.victim), EXACT)
    expected = count / 2 * math.log(away) + rough(guess.inputs)
    assert improbability(guess, SEEN, P.victim) == pytest.approx(expected, rel=1e-3)


def test_where_equations_are_many_they_decide_and_where_they_are_few_the_image_does() -> None:
    """The same two guesses: one explains the update a hundred times better, the other is smooth."""
    guess, smooth = mixed(0.02), FLAT
    one = next(iter(SEEN.update))
    few = dataclasses.replace(
        SEEN, update={k: torch.where(torch.arange(u.numel()).view(u.shape) < 2, u, 0) if k == one else 0 * u
                      for k, u in SEEN.update.items()}, defense=DGP(),
    )  # fmt: skip
    many = dataclasses.replace(SEEN, update={k: u.double() for k, u in SEEN.update.items()})
    assert misfit(guess, many, P.victim) < 0.01 * misfit(smooth, many, P.victim)
    assert rough(guess.inputs) > rough(smooth.inputs)
    assert improbability(guess, many, P.victim) < improbability(smooth, many, P.victim)
    assert improbability(guess, few, P.victim) > improbability(smooth, few, P.victim)


def test_who_explains_the_noise_too_is_less_probable_than_the_truth() -> None:
    """The closest update is closest to the noise: with the law known, the truth is as far off as noise is."""
    defense, images = GaussianNoise(scale=0.1), rough(RIGHT.inputs)
    noise = {k: 0.1 * torch.randn(v.shape, generator=stream(0, "noise", k)) for k, v in SEEN.update.items()}
    noisy = dataclasses.replace(SEEN, update={k: v + noise[k] for k, v in SEEN.update.items()}, defense=defense)

    def nats(guess: Reconstruction, seen: Observation) -> float:
        return (improbability(guess, seen, P.victim) - rough(guess.inputs)) / ENTRIES

    assert nats(RIGHT, noisy) == pytest.approx(0.5, abs=2 * math.sqrt(2 / ENTRIES))
    # an update as if there had been no noise: nothing is left to explain, which is as far from half a nat an entry
    assert nats(RIGHT, dataclasses.replace(SEEN, defense=defense)) == pytest.approx(1, abs=1e-4)
    quiet = dataclasses.replace(
        noisy, update={k: v + noise[k] / 100 for k, v in SEEN.update.items()}, defense=GaussianNoise(scale=0.001)
    )
    wrong = dataclasses.replace(RIGHT, inputs=1 - P.images[0])
    assert rough(wrong.inputs) == pytest.approx(images), "the images are as smooth as each other"
    assert nats(wrong, quiet) > 2 * nats(RIGHT, quiet)


@pytest.mark.parametrize("turned", [0, 7])
def test_a_sign_says_one_bit_and_no_more(turned: int) -> None:
    """All signs right is certainty; the log of a cosine would go on rewarding it, as if signs were numbers."""
    signs = {k: 0.5 * u.sign() for k, u in SEEN.update.items()}
    one = next(iter(signs))
    signs[one] = torch.where(torch.arange(signs[one].numel()).view(signs[one].shape) < turned, -signs[one], signs[one])
    count = sum(int((u != 0).sum()) for u in signs.values())
    wrong = int(((signs[one] != 0).flatten()[:turned]).sum()) / count
    entropy = -sum(p * math.log(p) for p in (wrong, 1 - wrong) if p)
    seen = dataclasses.replace(SEEN, update=signs)
    expected = count * entropy + rough(RIGHT.inputs)
    assert improbability(RIGHT, seen, P.victim) == pytest.approx(expected, rel=1e-3)
    against = dataclasses.replace(SEEN, update={k: -u for k, u in signs.items()})
    expected = count * math.log(2) + rough(RIGHT.inputs)
    assert improbability(RIGHT, against, P.victim) == pytest.approx(expected, rel=1e-3), "no better than chance"
