"""Stand-ins for rounding: its values, and a gradient where rounding has none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.func import grad, vmap

from gia_bench.defenses.base import Defense
from gia_bench.defenses.client_dp import ClientDP
from gia_bench.defenses.precision import HalfPrecision, Int8
from gia_bench.defenses.quantize import QSGD, SignSGD
from gia_bench.values import Observation

ANY: Any = None
ROUNDING: list[Defense] = [
    HalfPrecision(), HalfPrecision(dtype="bfloat16"), Int8(), Int8(scope="global"), SignSGD(), SignSGD(scale="none"),
]  # fmt: skip
UPDATE = {"w": torch.randn(7, 5, generator=torch.Generator().manual_seed(0)), "b": torch.linspace(-1, 2, 10) / 3}
SEEN = Observation(params=UPDATE, update=UPDATE)


@pytest.mark.parametrize("defense", ROUNDING, ids=repr)
def test_the_stand_in_of_the_true_update_is_what_was_sent(defense: Defense) -> None:
    sent, _ = defense.protect(UPDATE, ANY, {}, {}, {})
    for name, found in defense.surrogate(UPDATE, SEEN).items():
        assert not torch.equal(sent[name], UPDATE[name])
        assert torch.allclose(found, sent[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("defense", [*ROUNDING, Int8(rounding="stochastic"), QSGD()], ids=repr)
def test_its_gradient_is_that_of_the_update_itself_under_vmap_too(defense: Defense) -> None:
    def weighted(scale: torch.Tensor) -> torch.Tensor:
        own = defense.surrogate({k: scale * u for k, u in UPDATE.items()}, SEEN)
        return torch.stack([(u * u.shape[0]).sum() for u in own.values()]).sum()

    expected = sum(float((u * u.shape[0]).sum()) for u in UPDATE.values())
    slopes = vmap(grad(weighted))(torch.tensor([0.5, 1.0, 3.0]))
    assert slopes.tolist() == pytest.approx([expected] * 3, rel=1e-5)


def test_the_noise_of_client_level_privacy_is_public() -> None:
    law = ClientDP(max_norm=2.0, noise_multiplier=0.5).noise_law()
    assert law is not None
    assert float(law.surprise({"w": torch.ones(3)}, {"w": torch.zeros(3)})) == pytest.approx(3 / 2)
    assert ClientDP(noise_multiplier=0.0).noise_law() is None
