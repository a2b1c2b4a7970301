"""What an attacker may choose by: laws of how probable a reconstruction is, and no truth in it."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from attack_problems import problem
from torch import Tensor, nn

from gia_bench.attacks.evidence import EXACT, ROUGHNESS, improbability, misfit
from gia_bench.defenses.base import Client
from gia_bench.defenses.dgp import DGP
from gia_bench.defenses.noise import GaussianNoise
from gia_bench.defenses.quantize import SignSGD
from gia_bench.seeding import stream
from gia_bench.values import Batch, Reconstruction, Update

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


@pytest.mark.parametrize("scale", [0.001, 0.1, 0.3])
def test_of_noise_whose_law_is_known_the_density_counts(scale: float) -> None:
    """n / 2 nats of the truth in the mean; another image that is as smooth explains less, however strong the noise."""
    noise = {k: scale * torch.randn(v.shape, generator=stream(0, "noise", k)) for k, v in SEEN.update.items()}
    sent = {k: v + noise[k] for k, v in SEEN.update.items()}
    noisy = dataclasses.replace(SEEN, update=sent, defense=GaussianNoise(scale=scale))
    nats = (improbability(RIGHT, noisy, P.victim) - rough(RIGHT.inputs)) / ENTRIES
    assert nats == pytest.approx(0.5, abs=2 * math.sqrt(2 / ENTRIES))
    wrong = dataclasses.replace(RIGHT, inputs=1 - P.images[0])
    assert rough(wrong.inputs) == pytest.approx(rough(RIGHT.inputs))
    assert improbability(wrong, noisy, P.victim) > improbability(RIGHT, noisy, P.victim)


def test_a_gradient_with_zeros_is_held_against_its_signs_as_signsgd_sends_them() -> None:
    """ReLUs leave most of an update at 0, which is sent as +; the attacker does not know the defense."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))
    p = problem(2, shape=(1, 8, 8), module=module)
    o = p.observations[0]
    silent = sum(int((u == 0).sum()) for u in o.update.values())
    assert silent > 0.2 * sum(u.numel() for u in o.update.values()), "nothing is tested without zeros"
    client = Client(p.victim, o.params, {}, Batch(p.images[0], p.labels[0], torch.ones(1)))
    sent, _ = SignSGD().protect(o.update, client, {}, {}, {})
    right = Reconstruction(inputs=p.images[0], labels=p.labels[0], score=0.0)
    seen = dataclasses.replace(o, update=sent)
    assert improbability(right, seen, p.victim) == pytest.approx(rough(right.inputs), rel=1e-3)


def test_a_guess_without_labels_that_nobody_can_read_off_is_no_candidate() -> None:
    """A model without a linear head: the member that says no labels loses, and the others still play."""
    p = problem(1, shape=(1, 8, 8), module=nn.Sequential(nn.Conv2d(1, 4, 8), nn.Flatten()))
    silent = Reconstruction(inputs=p.images[0], labels=None, score=0.0)
    assert improbability(silent, p.observations[0], p.victim) == math.inf
    said = dataclasses.replace(silent, labels=p.labels[0])
    assert improbability(said, p.observations[0], p.victim) < math.inf


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
