"""Metrics against independent implementations."""

from __future__ import annotations

import warnings
from pathlib import Path

import lpips as lpips_package
import numpy as np
import pytest
import scipy.stats
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from sklearn.metrics import normalized_mutual_info_score
from torch import Tensor
from torchmetrics.functional.image import lpips as torchmetrics_lpips

from gia_bench.metrics import Lpips, summarize
from gia_bench.metrics.images import mse, psnr_db, ssim
from gia_bench.metrics.information import nmi
from gia_bench.metrics.lpips import NETS


def _pair(n: int, channels: int, height: int, width: int, noise: float = 0.2) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(channels * height + width)
    truth = torch.rand(n, channels, height, width, generator=draw)
    images = (truth + noise * torch.randn(truth.shape, generator=draw)).clamp(0, 1)
    return images, truth


@pytest.mark.parametrize(("channels", "height", "width"), [(1, 11, 11), (1, 16, 16), (3, 32, 32), (3, 24, 40)])
def test_ssim_of_each_image_equals_scikit_image(channels: int, height: int, width: int) -> None:
    images, truth = _pair(4, channels, height, width)
    expected = [
        structural_similarity(  # type: ignore[no-untyped-call]
            a.numpy(), b.numpy(), channel_axis=0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
            data_range=1.0,
        )
        for a, b in zip(images.double(), truth.double(), strict=True)
    ]  # fmt: skip
    assert ssim(images, truth).tolist() == pytest.approx(expected, abs=1e-9)


def test_psnr_of_each_image_equals_scikit_image() -> None:
    images, truth = _pair(4, 3, 8, 8)
    images[2] = (truth[2] + 0.001).clamp(0, 1)
    pairs = zip(images.numpy(), truth.numpy(), strict=True)
    expected = [peak_signal_noise_ratio(b, a, data_range=1.0) for a, b in pairs]  # type: ignore[no-untyped-call]
    assert psnr_db(images, truth).tolist() == pytest.approx(expected, rel=1e-5)


def test_mse_and_psnr_equal_hand_numbers() -> None:
    truth = torch.zeros(2, 1, 2, 2)
    images = truth.clone()
    images[0] += 0.1
    images[1, 0, 0, 0] = 1
    assert mse(images, truth).tolist() == pytest.approx([0.01, 0.25])
    assert psnr_db(images, truth).tolist() == pytest.approx([20.0, 6.0206], abs=1e-4)


@pytest.mark.parametrize("bins", [4, 256])
def test_nmi_equals_scikit_learn_on_the_quantised_pixels(bins: int) -> None:
    images, truth = _pair(3, 3, 16, 16, noise=0.05)
    truth[2] = 0.3
    pixels = [((x.double() * bins).floor().clamp(max=bins - 1)).flatten(1).int().numpy() for x in (images, truth)]
    expected = [normalized_mutual_info_score(b, a, average_method="arithmetic") for a, b in zip(*pixels, strict=True)]
    assert nmi(images, truth, bins).tolist() == pytest.approx(expected, abs=1e-9)


def test_nmi_of_two_constant_images_follows_scikit_learn() -> None:
    flat = torch.full((1, 1, 4, 4), 0.5)
    assert nmi(flat, flat / 2).item() == normalized_mutual_info_score([0] * 16, [1] * 16) == 1.0


@pytest.mark.parametrize("statistic", ["median", "mean"])
def test_the_bootstrap_interval_agrees_with_scipy(statistic: str) -> None:
    values = np.random.default_rng(3).normal(20, 4, size=40)
    reduce = np.median if statistic == "median" else np.mean
    expected = scipy.stats.bootstrap((values,), reduce, method="percentile", n_resamples=9999).confidence_interval
    summary = summarize(values.tolist(), statistic=statistic)  # type: ignore[arg-type]
    assert summary is not None
    assert summary.value == pytest.approx(reduce(values))
    assert (summary.low, summary.high) == pytest.approx((expected.low, expected.high), abs=0.4)


@pytest.mark.parametrize("net", sorted(NETS))
def test_the_stated_smallest_size_is_what_the_net_can_take(net: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        network = lpips_package.LPIPS(net=net, pnet_rand=True, verbose=False)
    size = NETS[net].min_size
    assert network(torch.zeros(1, 3, size, size), torch.ones(1, 3, size, size)).isfinite().all()
    with pytest.raises(RuntimeError, match="too small"):
        network(torch.zeros(1, 3, size - 1, size), torch.ones(1, 3, size - 1, size))


@pytest.mark.real_data
@pytest.mark.parametrize("net", ["alex", "squeeze"])
def test_lpips_equals_torchmetrics_with_the_same_backbone(net: str, data_root: Path) -> None:
    weights = data_root / "weights" / "lpips"
    images, truth = _pair(3, 3, 32, 32)
    oracle = torchmetrics_lpips._LPIPS(net=net, pnet_rand=True)  # type: ignore[arg-type]
    stored = torch.load(weights / NETS[net].file, weights_only=True)
    trunk = oracle.net.state_dict()
    oracle.net.load_state_dict({name: stored[_torchvision_name(name)] for name in trunk})
    with torch.no_grad():
        expected = oracle(images, truth, normalize=True).flatten()
    ours = Lpips(nets=[net], weights=weights, download=False).distance(net, images, truth)
    assert ours.tolist() == pytest.approx(expected.tolist(), abs=1e-4)


def _torchvision_name(name: str) -> str:
    """Slices of torchmetrics are "slice2.3.bias" or "slices.1.3.bias"."""
    layer = name.split(".", 2)[2] if name.startswith("slices.") else name.split(".", 1)[1]
    return f"features.{layer}"


@pytest.mark.real_data
def test_lpips_gives_the_numbers_in_the_documentation_of_torchmetrics(data_root: Path) -> None:
    draw = torch.Generator().manual_seed(42)
    first, second = (torch.rand(2, 3, 100, 100, generator=draw) for _ in range(2))
    lpips = Lpips(weights=data_root / "weights" / "lpips", download=False)
    assert lpips.distance("squeeze", first, second).tolist() == pytest.approx([0.1024, 0.0938], abs=1e-4)
