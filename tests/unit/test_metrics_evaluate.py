from __future__ import annotations

import math

import pytest
import torch

import gia_bench.metrics
from gia_bench.errors import ConfigError
from gia_bench.metrics import Metrics, evaluate, match
from gia_bench.values import Reconstruction, Truth

PLAIN = Metrics(lpips=None)


def _truth(n: int = 3, size: int = 16, channels: int = 1) -> Truth:
    draw = torch.Generator().manual_seed(0)
    return Truth(torch.rand(n, channels, size, size, generator=draw), torch.arange(n))


def _guess(inputs: torch.Tensor, **more: object) -> Reconstruction:
    return Reconstruction(**{"inputs": inputs, "labels": None, "score": 0.0, **more})  # type: ignore[arg-type]


def test_a_cycle_of_three_is_matched_forwards_and_not_backwards() -> None:
    a, b, c = torch.eye(3).view(3, 1, 1, 3)
    truth, reconstruction = torch.stack([a, b, c]), torch.stack([b, c, a])
    assert match(reconstruction, truth).tolist() == [2, 0, 1]


def test_a_black_filler_never_takes_a_dark_image_from_its_own_reconstruction() -> None:
    dark, bright = 0.05 * torch.eye(3)[None, None], torch.eye(3)[None, None]
    truth = torch.cat([dark, bright])
    black = torch.zeros_like(dark)
    assert match(torch.cat([black, dark]), truth).tolist() == [1, 0]
    # by squared error alone the exact one would have gone to the bright image
    assert (black - dark).square().sum() + (dark - bright).square().sum() < (black - bright).square().sum()
    assert match(torch.cat([black, black + 1]), truth).tolist() == [0, 1]  # among flat ones, the nearest


def test_images_of_another_shape_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"\(3, 16, 16\).*\(1, 16, 16\)"):
        evaluate(_guess(torch.rand(3, 3, 16, 16)), _truth(), PLAIN)


def test_a_perfect_reconstruction_has_the_best_score_of_every_metric() -> None:
    truth = _truth()
    scores = evaluate(_guess(truth.inputs.clone(), labels=truth.labels.flip(0)), truth, PLAIN)
    assert scores.of("mse") == [0, 0, 0]
    assert scores.of("psnr_db") == [100, 100, 100]
    assert scores.of("ssim") == pytest.approx([1, 1, 1])
    assert scores.of("label_accuracy") == [1]
    assert scores.median("psnr_db") == 100


def test_where_no_image_is_behind_an_update_every_metric_is_unavailable_with_the_reason() -> None:
    scores = evaluate(_guess(torch.zeros(0, 1, 16, 16), failure="none"), _truth(0), Metrics(lpips=None))
    assert [v.metric for v in scores.values] == ["mse", "psnr_db", "ssim", "label_accuracy"]
    for value in scores.values:
        assert (value.victim, value.value, value.status) == (None, None, "unavailable")
        assert value.reason is not None and "empty batch" in value.reason
    assert scores.matching.shape == (0,)


def test_every_value_names_its_victim_unit_and_direction() -> None:
    values = evaluate(
        _guess(_truth().inputs), _truth(), Metrics(names=["psnr_db", "label_accuracy"], lpips=None)
    ).values
    assert [(v.metric, v.victim, v.unit, v.better_for_defender) for v in values] == [
        ("psnr_db", 0, "dB", "lower"),
        ("psnr_db", 1, "dB", "lower"),
        ("psnr_db", 2, "dB", "lower"),
        ("oracle_flat_psnr_db", 0, "dB", None),
        ("oracle_flat_psnr_db", 1, "dB", None),
        ("oracle_flat_psnr_db", 2, "dB", None),
        ("label_accuracy", None, None, "lower"),
    ]


def test_values_outside_the_unit_range_are_clamped_before_they_are_scored() -> None:
    truth = Truth(torch.ones(1, 1, 16, 16), torch.zeros(1, dtype=torch.int64))
    assert evaluate(_guess(torch.full((1, 1, 16, 16), 7.0)), truth, PLAIN).of("mse") == [0]


def test_psnr_is_not_pooled_over_the_batch() -> None:
    truth = Truth(torch.zeros(2, 1, 16, 16), torch.zeros(2, dtype=torch.int64))
    guess = torch.stack([torch.full((1, 16, 16), 0.1), torch.ones(1, 16, 16)])
    assert evaluate(_guess(guess), truth, PLAIN).of("psnr_db") == pytest.approx([20.0, 0.0], abs=1e-5)


def test_a_failed_attack_gives_failed_values_with_its_reason() -> None:
    scores = evaluate(_guess(torch.zeros(0, 1, 16, 16), failure="diverged at step 3"), _truth(), PLAIN)
    attacked = [v for v in scores.values if not v.metric.startswith("oracle_")]
    assert len(attacked) == 10
    assert {(v.status, v.value, v.reason) for v in attacked} == {("failed", None, "diverged at step 3")}
    assert scores.matching.tolist() == [-1, -1, -1]
    assert scores.median("psnr_db") is None


def test_images_without_a_reconstruction_are_failed_and_the_others_scored() -> None:
    truth = _truth()
    scores = evaluate(_guess(truth.inputs[[2, 0]]), truth, PLAIN)
    assert scores.of("psnr_db") == [100, None, 100]
    absent = [v for v in scores.values if v.metric == "psnr_db" and v.victim == 1]
    assert [v.status for v in absent] == ["failed"]
    assert absent[0].reason == "no reconstruction for this image: 2 for 3 images, 0 of them not finite"


def test_a_reconstruction_with_nan_is_never_matched() -> None:
    truth = _truth()
    guess = truth.inputs.clone()
    guess[1, 0, 0, 0] = math.nan
    scores = evaluate(_guess(guess), truth, PLAIN)
    assert scores.of("mse") == [0, None, 0]
    assert scores.matching.tolist() == [0, -1, 2]


def test_ssim_of_images_below_its_window_is_unavailable_and_not_a_number() -> None:
    scores = evaluate(_guess(_truth(size=8).inputs), _truth(size=8), PLAIN)
    ssim = [v for v in scores.values if v.metric == "ssim"]
    assert {(v.status, v.value) for v in ssim} == {("unavailable", None)}
    assert ssim[0].reason == "ssim needs images of 11x11 or more, these are 8x8"
    assert scores.of("psnr_db") == [100, 100, 100]


@pytest.mark.parametrize(
    ("guessed", "share"), [([2, 0, 1, 1], 1.0), ([0, 0, 1, 1], 0.75), ([5, 5, 5, 5], 0.0), ([1, 2], 0.5)]
)
def test_label_accuracy_is_the_overlap_of_multisets(guessed: list[int], share: float) -> None:
    truth = Truth(torch.rand(4, 1, 16, 16), torch.tensor([0, 1, 1, 2]))
    scores = evaluate(_guess(truth.inputs, labels=torch.tensor(guessed)), truth, PLAIN)
    assert scores.of("label_accuracy") == [share]


def test_listing_every_class_does_not_raise_the_label_accuracy() -> None:
    truth = Truth(torch.rand(2, 1, 16, 16), torch.tensor([3, 4]))
    scores = evaluate(_guess(torch.rand(10, 1, 16, 16), labels=torch.arange(10)), truth, PLAIN)
    assert scores.of("label_accuracy") == [0.2]


def test_an_attack_without_labels_has_no_label_accuracy() -> None:
    value = evaluate(_guess(_truth().inputs), _truth(), PLAIN).values[-1]
    assert (value.metric, value.status, value.value) == ("label_accuracy", "unavailable", None)


def test_pictures_show_the_matched_pairs() -> None:
    truth = _truth()
    guess = truth.inputs[[1, 2]] + 2
    guess[1] -= 2
    aligned = evaluate(_guess(guess), truth, PLAIN).aligned(guess)
    assert torch.allclose(aligned[2], truth.inputs[2], atol=1e-6)
    assert aligned.isnan().flatten(1).all(1).sum() == 1
    assert aligned.nan_to_num(0).max() <= 1


def test_the_default_metrics_need_no_setting() -> None:
    scores = gia_bench.metrics.evaluate(_guess(_truth().inputs), _truth())
    metrics = list(dict.fromkeys(v.metric for v in scores.values))
    assert metrics == ["mse", "psnr_db", "ssim", "lpips_squeeze", "oracle_flat_psnr_db", "label_accuracy"]


def test_unknown_metrics_list_the_choices() -> None:
    with pytest.raises(ConfigError, match=r"psnr.*Choose one of:.*psnr_db"):
        Metrics(names=["psnr"])
    with pytest.raises(ConfigError, match=r"Choose one of: .*mse"):
        evaluate(_guess(_truth().inputs), _truth(), PLAIN).of("nmi")


def test_a_flat_image_of_the_right_colour_is_what_an_attack_has_to_beat() -> None:
    truth = _truth(channels=3)
    scores = evaluate(_guess(truth.inputs), truth, PLAIN)
    variances = truth.inputs.var((2, 3), correction=0).mean(1)
    assert scores.of("oracle_flat_psnr_db") == pytest.approx((-10 * variances.log10()).tolist(), rel=1e-5)
