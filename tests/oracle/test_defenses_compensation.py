"""GradDefense's compensation against numpy and numbers computed by hand."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch

from gia_bench.defenses.base import Client
from gia_bench.defenses.compensation import VARIANCES, RandomMatrix, marchenko_pastur
from gia_bench.defenses.graddefense import GradDefense
from gia_bench.defenses.sensitivity import LayerSize
from gia_bench.seeding import stream
from gia_bench.values import Params, Shared, Update

ANY: Any = None  # what these calls do not look at
SIZES = LayerSize()


def announced(defense: GradDefense, params: Params, m: int = 1, round_index: int = 0) -> Shared:
    return defense.announce(params, defense.init_server(params), round_index, m, stream(0, "announce"), ANY)


def test_the_band_and_the_variances_by_hand() -> None:
    assert marchenko_pastur(0.02, 4.0) == (pytest.approx(0.005), pytest.approx(0.045))
    assert marchenko_pastur(1.0, 1.0) == (0, 4)
    defense = GradDefense(variance=1e-2, gamma=0.2, slices=10)

    def assumed(variance: str, m: int) -> float:
        seen = []

        class Spy:
            def denoise(self, update: Update, per_entry: float, shares: list[float]) -> Update:
                seen.append((per_entry, shares))
                return update

        dataclasses.replace(defense, compensation=Spy()).compensate(  # type: ignore[arg-type]
            {}, {}, {"risk": torch.zeros(1)}, [1 / m] * m
        )
        return VARIANCES[variance](*seen[0])

    # m (d/s) sigma^2 = 10 * 0.2 * 0.01, and (d/s) sigma^2 / m
    assert assumed("paper", 10) == pytest.approx(0.02)
    assert assumed("exact", 10) == pytest.approx(0.0002)
    assert assumed("paper", 1) == assumed("exact", 1) == pytest.approx(0.002)


def test_the_exact_variance_is_that_of_a_mean_of_protected_updates() -> None:
    params, m = {"w": torch.zeros(100, 300), "b": torch.zeros(10)}, 5
    defense = GradDefense(variance=0.09, gamma=0.4, slices=10, risk=SIZES)
    shared = announced(defense, params, m)
    sent = [
        defense.protect(params, Client(ANY, params, {}, ANY), {}, shared, defense.draw(params, ANY, stream(t)))[0]["w"]
        for t in range(40 * m)
    ]
    means = torch.stack(sent).view(40, m, -1).mean(1)
    assert float(means.square().mean()) == pytest.approx(0.4 * 0.09 / m, rel=0.05)


def test_the_exact_variance_is_that_of_a_mean_with_any_weights() -> None:
    shares = [0.5, 0.3, 0.1, 0.1]
    noise = 0.3 * torch.randn(4, 200_000, generator=stream(0))
    mean = (torch.tensor(shares)[:, None] * noise).sum(0)
    assert VARIANCES["exact"](0.09, shares) == pytest.approx(float(mean.var()), rel=0.02)


@pytest.mark.parametrize(
    ("entries", "q", "shape"),
    [
        (15_826, 6, (386, 41)),
        (85_036, 6, (3037, 28)),
        (19_438, 6, (9719, 2)),
        (2_904_970, 6, (290_497, 10)),
        (7, 6, (7, 1)),
    ],
)
def test_exact_factors_are_those_of_the_released_rule(entries: int, q: float, shape: tuple[int, int]) -> None:
    assert RandomMatrix(q=q, pad=False).shape(entries) == shape


@pytest.mark.parametrize("entries", [1, 2, 10, 12, 15_826, 85_036, 19_438, 2_904_970])
@pytest.mark.parametrize("q", [1, 6, 12, 20])
def test_padding_reaches_the_wanted_quotient_with_less_than_a_row_too_much(entries: int, q: float) -> None:
    v, w = RandomMatrix(q=q).shape(entries)
    assert v * w >= entries > v * (w - 1)
    if entries > 10_000:
        assert v / w == pytest.approx(q, rel=0.06)


@pytest.mark.parametrize("pad", [True, False])
def test_denoising_is_numpys_projection_on_the_eigenvectors_outside_the_band(pad: bool) -> None:
    g = stream(0)
    loud = 1 + 2.0 * (torch.arange(404) % 4 == 0)  # some columns of either matrix
    entries = (loud * torch.randn(404, generator=g)).double()
    update = {"w": entries[:391].view(23, 17), "b": entries[391:]}
    matrix = RandomMatrix(q=3, pad=pad, variance="exact")
    v, w = matrix.shape(404)
    row = np.zeros(v * w)
    row[:404] = torch.cat([u.reshape(-1) for u in update.values()]).numpy()
    c = row.reshape(v, w)
    values, vectors = np.linalg.eig(np.atleast_2d(np.cov(c, rowvar=False)))
    low, high = (1 - math.sqrt(w / v)) ** 2, (1 + math.sqrt(w / v)) ** 2
    outside = (values <= low) | (values >= high)
    assert 0 < outside.sum() < w
    expected = (c @ vectors[:, outside] @ vectors[:, outside].T).reshape(-1)[:404]
    found = matrix.denoise(update, 2.0, [0.5, 0.5])  # exact: 2 / 2
    assert np.allclose(torch.cat([f.reshape(-1) for f in found.values()]).numpy(), expected)
    assert {k: f.shape for k, f in found.items()} == {k: u.shape for k, u in update.items()}


def test_pure_noise_vanishes_and_a_signal_of_low_rank_gets_nearer() -> None:
    g = stream(0)
    noise = {"w": 0.1 * torch.randn(30_000, generator=g)}
    matrix = RandomMatrix(variance="exact")
    left = matrix.denoise(noise, 0.01, [1.0])["w"]
    assert float(left.square().sum() / noise["w"].square().sum()) < 0.05
    v, w = matrix.shape(30_000)
    signal = (torch.randn(v, 2, generator=g) @ torch.randn(2, w, generator=g) * 0.1).reshape(-1)[:30_000]
    noisy = signal + noise["w"]
    before, after = (float((x - signal).norm()) for x in (noisy, matrix.denoise({"w": noisy}, 0.01, [1.0])["w"]))
    assert after < 0.35 * before


def test_the_papers_variance_keeps_the_noise_of_a_mean_because_it_lies_below_the_band() -> None:
    mean = {"w": torch.randn(30_000, generator=stream(0)) * math.sqrt(0.2 * 0.01 / 10)}  # of 10 clients
    kept = RandomMatrix(variance="paper").denoise(mean, 0.2 * 0.01, [0.1] * 10)
    assert torch.equal(kept["w"], mean["w"])
    gone = RandomMatrix(variance="exact").denoise(mean, 0.2 * 0.01, [0.1] * 10)
    assert float(gone["w"].norm() / mean["w"].norm()) < 0.25


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("pad", [True, False])
@pytest.mark.parametrize("q", [1.0, 6.0])
def test_no_noise_and_tiny_tensors_pass_unharmed(scope: str, pad: bool, q: float) -> None:
    g = stream(0)
    shapes = {"w": (7, 9), "one": (1,), "two": (2,)}
    update = {k: torch.randn(shape, generator=g) for k, shape in shapes.items()}
    same = RandomMatrix(scope=scope, pad=pad, q=q).denoise(update, 0.0, [1 / 3] * 3)
    assert all(torch.equal(same[k], u) for k, u in update.items())
    noisy = RandomMatrix(scope=scope, pad=pad, q=q).denoise(update, 1.0, [1 / 3] * 3)
    assert all(x.isfinite().all() for x in noisy.values())
