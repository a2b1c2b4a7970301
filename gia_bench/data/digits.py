"""The handwritten digits inside scikit-learn: real images on any machine, without a download."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from sklearn.datasets import load_digits
from torchvision.transforms.v2 import functional as transforms

from gia_bench.data.source import Dataset, InMemory, fingerprint, per_channel
from gia_bench.data.split import stratified
from gia_bench.errors import ConfigError


def digits(
    *, size: int = 16, test_fraction: float = 0.2, mean: Sequence[float] = (0.3053,), std: Sequence[float] = (0.3189,)
) -> Dataset:
    """1,797 digits of 8x8 pixels with values 0..16, scaled to [0, 1] and resized to ``size`` (bilinear).

    The default of 16 pixels is a gia_bench choice: SSIM's window is 11x11, so that 8 pixels cannot be measured.
    The test split is fixed and stratified, 1,437 / 360 by default. mean and std: measured on all images at 16
    pixels. Source: scikit-learn's copy of the UCI optical recognition of handwritten digits test set.
    """
    if size < 8:
        raise ConfigError(f"dataset.size={size} is smaller than the digits' own 8 pixels; use 8 or more.")
    loaded = load_digits()
    pixels = torch.from_numpy(loaded.images).float().unsqueeze(1) / 16
    pixels = transforms.resize(pixels, [size, size], antialias=True).clamp(0, 1)
    labels = torch.from_numpy(loaded.target).long()
    train, test = (InMemory(pixels[rows], labels[rows]) for rows in stratified(labels, test_fraction, "digits"))
    return Dataset(
        name="digits",
        train=train,
        test=test,
        num_classes=10,
        shape=train.shape,
        mean=per_channel(mean, 1),
        std=per_channel(std, 1),
        version=fingerprint(train, test),
    )
