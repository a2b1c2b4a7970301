"""The trend of leakage bounds on numbers worked out by hand, and where it is recorded."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from gia_bench.defenses.base import Defense
from gia_bench.defenses.chain import Chain
from gia_bench.defenses.clip import ClipUpdate
from gia_bench.defenses.none import NoDefense
from gia_bench.defenses.priprune import PriPrune
from gia_bench.defenses.top_k import TopK
from gia_bench.errors import ConfigError
from gia_bench.metrics import Metrics
from gia_bench.probes.bounds import BoundsProbe, leakage_bound, prunes
from gia_bench.pruning.pruned import with_pruning
from gia_bench.pruning.random_mask import RandomMask
from gia_bench.seeding import stream


def test_the_trend_is_the_number_worked_out_by_hand() -> None:
    # 1 / (9 * 20) + 500 / 2 * log(10 / 9) = 0.00556 + 250 * 0.1053605
    assert leakage_bound(500, 20, 10) == pytest.approx(26.345684, abs=1e-5)
    assert leakage_bound(0, 5, 3, constant=2.0) == pytest.approx(0.2)


def test_it_falls_with_the_pruning_rate_the_batch_size_and_the_number_of_clients() -> None:
    by_rate = [leakage_bound((1 - p) * 1000, 8, 10) for p in (0.0, 0.3, 0.6, 0.9)]
    by_batch = [leakage_bound(100, b, 10) for b in (1, 2, 8, 64)]
    by_clients = [leakage_bound(100, 8, n) for n in (1, 2, 10, 100)]
    for values in (by_rate, by_batch, by_clients):
        assert values == sorted(values, reverse=True) and len(set(values)) == len(values)


def test_alone_nothing_is_bounded_and_no_round_has_less_than_nothing() -> None:
    assert leakage_bound(10, 8, 1) == math.inf
    for rank, batch_size, num_clients in ((-1, 8, 2), (1, 0, 2), (1, 8, 0)):
        with pytest.raises(ValueError, match="no such round"):
            leakage_bound(rank, batch_size, num_clients)


def test_an_empty_batch_has_no_trend_and_the_record_says_why() -> None:
    class Recorded:
        def add(self, metric: str, value: float | None, **place: Any) -> None:
            lines[metric] = (value, place.get("status"), place.get("reason"))

    lines: dict[str, Any] = {}
    BoundsProbe(Recorded())._record({"w": torch.zeros(4)}, 0, 3)  # type: ignore[arg-type]
    value, status, reason = lines["leakage_trend_nats"]
    assert (value, status) == (None, "unavailable") and "empty batch" in reason


@pytest.mark.parametrize(
    ("defense", "expected"),
    [
        (NoDefense(), False),
        (TopK(), False),
        (PriPrune(), True),
        (Chain(stages={"clip": ClipUpdate(), "own": PriPrune()}), True),
        (Chain(stages={"clip": ClipUpdate(), "top_k": TopK()}), False),
        (with_pruning(NoDefense(), RandomMask()), True),
    ],
    ids=["none", "top_k", "priprune", "in a chain", "chain", "pruned"],
)
def test_it_is_recorded_where_weights_are_pruned_or_withheld(defense: Defense, expected: bool) -> None:
    assert prunes(defense) is expected


def test_the_bins_of_nmi_can_be_chosen() -> None:
    images, truth = torch.rand(2, 2, 1, 8, 8, generator=stream(0))
    few, many = (Metrics(names=["nmi"], lpips=None, nmi_bins=n).per_image["nmi"](images, truth) for n in (2, 256))
    assert (few < many).all()
    with pytest.raises(ConfigError, match=r"metrics\.nmi_bins=1"):
        Metrics(nmi_bins=1)
