"""Client-level differential privacy: its length, its noise, and that it is the chain of clipping and noise."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gia_bench.defenses.client_dp import ClientDP
from gia_bench.defenses.clip import ClipUpdate
from gia_bench.defenses.dp_accounting import Accounted, Mechanism
from gia_bench.defenses.noise import GaussianNoise
from gia_bench.errors import ConfigError
from gia_bench.seeding import stream
from gia_bench.values import Observation, Update

ANY: Any = None  # the client and batch, which it does not look at


def update(scale: float = 1.0) -> Update:
    g = stream(0, "update")
    return {"w": scale * torch.randn(40, 30, generator=g), "b": scale * torch.randn(40, generator=g)}


def joint(tensors: Update) -> float:
    return float(torch.cat([t.view(-1) for t in tensors.values()]).norm())


@pytest.mark.parametrize(("scale", "length"), [(1.0, 0.5), (1e-3, None)])
def test_without_noise_a_long_update_has_the_bound_as_its_length_and_a_short_one_stays(
    scale: float, length: float | None
) -> None:
    own = update(scale)
    noise = ClientDP().draw(own, ANY, stream(1))
    sent, state = ClientDP(max_norm=0.5, noise_multiplier=0).protect(own, ANY, {}, {}, noise)
    assert state == {}
    assert joint(sent) == pytest.approx(length or joint(own), rel=1e-5)
    assert torch.allclose(sent["w"] / joint(sent), own["w"] / joint(own), atol=1e-6)


def test_the_noise_has_the_stated_deviation_and_does_not_depend_on_the_update() -> None:
    defense, silent = ClientDP(max_norm=0.5, noise_multiplier=3.0), ClientDP(max_norm=0.5, noise_multiplier=0)
    noises = []
    for own in (update(), update(1e-3)):
        noise = defense.draw(own, ANY, stream(1))
        noisy, clean = (d.protect(own, ANY, {}, {}, noise)[0] for d in (defense, silent))
        noises.append(torch.cat([(noisy[k] - clean[k]).view(-1) for k in own]))
    # 1,240 draws: a standard error of 2 % of the deviation
    assert float(noises[0].std()) == pytest.approx(1.5, rel=0.1)
    assert torch.allclose(noises[0], noises[1], atol=1e-5)


def test_it_is_clipping_and_then_gaussian_noise() -> None:
    own = update()
    noise = ClientDP().draw(own, ANY, stream(1))
    together, _ = ClientDP(max_norm=2.0, noise_multiplier=0.25).protect(own, ANY, {}, {}, noise)
    short, _ = ClipUpdate(max_norm=2.0).protect(own, ANY, {}, {}, {})
    apart, _ = GaussianNoise(scale=0.5).protect(short, ANY, {}, {}, noise)
    assert all(torch.equal(together[k], a) for k, a in apart.items())


def test_an_attacker_who_knows_it_clips_the_dummy() -> None:
    stand_in = ClientDP(max_norm=0.5).surrogate(update(), Observation(params={}, update=update()))
    assert joint(stand_in) == pytest.approx(0.5, rel=1e-5)


def test_its_mechanism_is_of_whole_clients() -> None:
    defense = ClientDP(noise_multiplier=2.0, delta=1e-6, accountant="prv")
    assert isinstance(defense, Accounted)
    assert defense.mechanism == Mechanism("client", 2.0, 1e-6, "prv")
    assert not isinstance(GaussianNoise(scale=1.0), Accounted)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"max_norm": 0}, "max_norm=0 must be finite and above 0"),
        ({"noise_multiplier": -1}, "noise_multiplier=-1 must be finite and at least 0"),
        ({"delta": 0}, r"defense client_dp: delta=0 must lie in \(0, 1\)"),
        ({"accountant": "gdp"}, "defense client_dp: accountant='gdp' is not known. Choose one of: prv, rdp"),
    ],
)
def test_a_value_out_of_range_is_refused_with_a_sentence(changed: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        ClientDP(**changed)
