from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from gia_bench.defenses.base import Defense
from gia_bench.defenses.client_dp import ClientDP
from gia_bench.defenses.noise import Gaussian, GaussianNoise, LaplaceNoise
from gia_bench.defenses.none import NoDefense
from gia_bench.errors import ConfigError
from gia_bench.seeding import stream
from gia_bench.values import Observation

ANY: Any = None  # the client and batch, which these defenses do not look at


@pytest.mark.parametrize("defense", [NoDefense(), GaussianNoise(scale=1.0), LaplaceNoise(scale=1.0)])
def test_the_surrogate_of_noise_is_the_update(defense: Defense) -> None:
    update = {"w": torch.ones(3)}
    assert defense.surrogate(update, Observation(params={}, update={})) is update


LIKE = {"w": torch.zeros(400, 500), "b": torch.zeros(())}
NOISES: list[tuple[Defense, float, float]] = [
    (GaussianNoise(variance=1e-2), 1e-2, 0.0),
    (GaussianNoise(scale=0.2), 0.04, 0.0),
    (LaplaceNoise(variance=1e-2), 1e-2, 3.0),
    (LaplaceNoise(scale=0.1), 0.02, 3.0),
]


@pytest.mark.parametrize(("defense", "variance", "excess_kurtosis"), NOISES)
def test_noise_has_the_stated_mean_variance_and_shape(
    defense: Defense, variance: float, excess_kurtosis: float
) -> None:
    noise = defense.draw(LIKE, ANY, stream(0, "noise"))
    sent, state = defense.protect(LIKE, ANY, {}, {}, noise)
    errors = sent["w"].double()
    assert state == {}
    assert sent["b"].shape == ()
    # 200,000 draws: standard errors are 0.2 % of the deviation, about 0.5 % of the variance, 0.1 of the kurtosis
    assert abs(float(errors.mean())) < 0.012 * math.sqrt(variance)
    assert float(errors.var()) == pytest.approx(variance, rel=0.03)
    assert float((errors**4).mean() / errors.var() ** 2 - 3) == pytest.approx(excess_kurtosis, abs=0.5)


@pytest.mark.parametrize("defense", [case[0] for case in NOISES])
def test_noise_is_drawn_on_the_cpu_in_single_precision_from_the_generator_alone(defense: Defense) -> None:
    like = {"w": torch.zeros(3, 4, dtype=torch.float64), "b": torch.zeros(2)}
    first, again, other = (defense.draw(like, ANY, stream(seed)) for seed in (0, 0, 1))
    for name in like:
        assert (first[name].dtype, first[name].device.type, first[name].shape) == (
            torch.float32,
            "cpu",
            like[name].shape,
        )
        assert torch.equal(first[name], again[name])
        assert not torch.equal(first[name], other[name])
    assert defense.protect(like, ANY, {}, {}, first)[0]["w"].dtype == torch.float64


@pytest.mark.parametrize("defense", [GaussianNoise(scale=0.3), LaplaceNoise(scale=0.3), ClientDP(noise_multiplier=0.3)])
def test_the_law_of_a_mean_has_the_deviation_of_the_mean(defense: Defense) -> None:
    """The most probable scale of noise averaged over 25 clients is that which the law has."""
    like = {"w": torch.zeros(2000)}
    draws = [defense.draw(like, ANY, stream(client)) for client in range(25)]
    sent = [defense.protect(like, ANY, {}, {}, noise)[0]["w"] for noise in draws]
    law = defense.noise_law(Observation(params=like, update=like, num_clients=25))
    assert isinstance(law, Gaussian)
    assert float(torch.stack(sent).mean(0).std()) == pytest.approx(law.sigma, rel=0.05)


def test_zero_noise_is_no_noise() -> None:
    update = {"w": torch.randn(5)}
    for defense in (GaussianNoise(scale=0), LaplaceNoise(variance=0)):
        assert torch.equal(
            defense.protect(update, ANY, {}, {}, defense.draw(update, ANY, stream(0)))[0]["w"], update["w"]
        )


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: GaussianNoise(), r"gaussian_noise: give exactly one of variance and scale"),
        (lambda: LaplaceNoise(variance=0.1, scale=0.1), r"laplace_noise: give exactly one of variance and scale"),
        (lambda: GaussianNoise(variance=-1), r"variance=-1 must be finite and at least 0"),
        (lambda: LaplaceNoise(scale=math.inf), r"scale=inf must be finite"),
    ],
)
def test_a_noise_level_out_of_range_is_refused_with_a_sentence(make: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        make()
