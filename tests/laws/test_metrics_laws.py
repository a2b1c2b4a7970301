"""What holds for every batch of images."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gia_bench.metrics import Metrics, evaluate, match, paired_difference, summarize
from gia_bench.metrics.images import PSNR_CAP_DB
from gia_bench.metrics.information import nmi
from gia_bench.report.figures import pareto_front
from gia_bench.values import Reconstruction, Truth

METRICS = Metrics(names=["mse", "psnr_db", "ssim", "nmi", "label_accuracy"], lpips=None)
ORDERS = st.integers(1, 6).flatmap(lambda n: st.permutations(range(n)))
finite = st.floats(-1e3, 1e3)


def _truth(n: int) -> Truth:
    draw = torch.Generator().manual_seed(n)
    return Truth(torch.rand(n, 1, 12, 12, generator=draw), torch.randint(0, 3, (n,), generator=draw))


def _guess(inputs: Tensor, labels: Tensor | None = None) -> Reconstruction:
    return Reconstruction(inputs=inputs, labels=labels, score=0.0)


@given(order=ORDERS)
@settings(max_examples=20, deadline=None)
def test_match_undoes_any_order_of_exact_reconstructions(order: list[int]) -> None:
    truth = _truth(len(order)).inputs
    reconstruction = truth[order]
    assert torch.equal(reconstruction[match(reconstruction, truth)], truth)


@given(order=ORDERS)
@settings(max_examples=20, deadline=None)
def test_no_score_depends_on_the_order_of_the_reconstructions(order: list[int]) -> None:
    truth = _truth(len(order))
    noisy = truth.inputs + 0.1 * torch.randn(truth.inputs.shape, generator=torch.Generator().manual_seed(0))
    assert evaluate(_guess(noisy, truth.labels), truth, METRICS).values == pytest.approx(
        evaluate(_guess(noisy[order], truth.labels[order]), truth, METRICS).values
    )


@given(found=st.integers(0, 6), wanted=st.integers(1, 6))
@settings(max_examples=20, deadline=None)
def test_match_is_one_to_one_and_uses_as_many_images_as_it_can(found: int, wanted: int) -> None:
    draw = torch.Generator().manual_seed(found)
    partner = match(torch.rand(found, 1, 4, 4, generator=draw), torch.rand(wanted, 1, 4, 4, generator=draw))
    used = partner[partner >= 0].tolist()
    assert len(used) == len(set(used)) == min(found, wanted)
    assert set(used) <= set(range(found))


@given(scale=st.floats(0.0, 2.0))
@settings(max_examples=20, deadline=None)
def test_scores_stay_in_their_ranges(scale: float) -> None:
    truth = _truth(3)
    noise = torch.randn(truth.inputs.shape, generator=torch.Generator().manual_seed(1))
    scores = evaluate(_guess(truth.inputs + scale * noise), truth, METRICS)
    ranges = {"mse": (0, 1), "psnr_db": (0, PSNR_CAP_DB), "ssim": (-1, 1), "nmi": (0, 1)}
    for metric, (low, high) in ranges.items():
        values = scores.of(metric)
        assert len(values) == 3
        assert all(value is not None and low <= value <= high + 1e-12 for value in values)


@given(values=st.lists(finite, min_size=1, max_size=30), statistic=st.sampled_from(["median", "mean"]))
@settings(max_examples=50, deadline=None)
def test_an_interval_lies_within_the_values_and_is_the_same_every_time(values: list[float], statistic: str) -> None:
    first, again = (summarize(values, statistic=statistic) for _ in range(2))  # type: ignore[arg-type]
    assert first == again
    assert first is not None
    assert first.num_victims == len(values)
    if len(values) > 1:
        assert first.low is not None
        assert first.high is not None
        slack = 1e-9 * max(map(abs, values))
        assert min(values) - slack <= first.low <= first.high <= max(values) + slack


@given(pairs=st.dictionaries(st.integers(), st.tuples(finite, finite), min_size=1, max_size=20))
@settings(max_examples=50, deadline=None)
def test_a_paired_mean_difference_is_the_difference_of_the_means(pairs: dict[int, tuple[float, float]]) -> None:
    condition, control = ({key: pair[i] for key, pair in pairs.items()} for i in range(2))
    difference = paired_difference(condition, control, statistic="mean")
    assert difference is not None
    expected = math.fsum(a - b for a, b in pairs.values()) / len(pairs)
    assert difference.value == pytest.approx(expected, abs=1e-6)


@given(points=st.lists(st.tuples(finite, finite), min_size=1, max_size=20))
def test_the_front_holds_exactly_the_points_that_nothing_beats(points: list[tuple[float, float]]) -> None:
    front = pareto_front(points)
    assert front
    for i, point in enumerate(points):
        better = [p for p in points if p != point and p[0] <= point[0] and p[1] <= point[1]]
        assert (i in front) == (not better)


@given(values=st.permutations([k / 255 for k in range(256)]))
@settings(max_examples=20, deadline=None)
def test_an_image_tells_all_about_itself_and_its_recoloured_copy(values: list[float]) -> None:
    image = torch.tensor([k / 255 for k in range(256)]).view(1, 1, 16, 16)
    recoloured = torch.tensor(values).view(1, 1, 16, 16)
    assert nmi(recoloured, image).item() == pytest.approx(1.0)
