"""MNIST and Fashion-MNIST, through torchvision."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torchvision import datasets
from torchvision.datasets.mnist import read_image_file, read_label_file
from torchvision.transforms.v2 import functional as transforms

from gia_bench.data.files import Files
from gia_bench.data.source import Dataset, InMemory, fingerprint, per_channel
from gia_bench.errors import ConfigError


def mnist(
    *,
    root: str,
    download: bool = True,
    size: int | None = None,
    channels: int = 1,
    mean: Sequence[float] = (0.1307,),
    std: Sequence[float] = (0.3081,),
) -> Dataset:
    """60,000 + 10,000 handwritten digits, 28x28, 10 classes.

    size: height and width after bilinear resizing (None: 28; GradDefense uses 32); channels: 1, or 3 equal ones.
    Raises ``DataError`` where files are absent or corrupt. Source: LeCun et al. 1998.
    """
    return _load(datasets.MNIST, "mnist", root, download, size, channels, mean, std)


def fashion_mnist(
    *,
    root: str,
    download: bool = True,
    size: int | None = None,
    channels: int = 1,
    mean: Sequence[float] = (0.2860,),
    std: Sequence[float] = (0.3530,),
) -> Dataset:
    """60,000 + 10,000 pictures of clothes, 28x28, 10 classes; the arguments of ``mnist``. Source: Xiao et al. 2017."""
    return _load(datasets.FashionMNIST, "fashion_mnist", root, download, size, channels, mean, std)


def _load(
    # Any: torchvision's classes carry no types
    kind: Any,
    name: str,
    root: str,
    download: bool,
    size: int | None,
    channels: int,
    mean: Sequence[float],
    std: Sequence[float],
) -> Dataset:
    if channels not in (1, 3):
        raise ConfigError(f"dataset.channels={channels} is not possible for {name}; use 1, or 3 for equal channels.")
    if size is not None and size < 1:
        raise ConfigError(f"dataset.size={size} must be at least 1 pixel; null keeps the original 28.")
    base = Path(root).expanduser()
    files = Files(
        dataset=name,
        folder=base / kind.__name__ / "raw",
        names=tuple(archive.removesuffix(".gz") for archive, _ in kind.resources),
        archives=dict(kind.resources),
        urls=tuple(f"{kind.mirrors[0]}{archive}" for archive, _ in kind.resources),
    )
    if files.must_fetch(download):
        with files.fetching():
            kind(base, download=True)
    train, test = (_split(files, prefix, size, channels) for prefix in ("train", "t10k"))
    return Dataset(
        name=name,
        train=train,
        test=test,
        num_classes=10,
        shape=train.shape,
        mean=per_channel(mean, channels),
        std=per_channel(std, channels),
        version=fingerprint(train, test),
    )


def _split(files: Files, prefix: str, size: int | None, channels: int) -> InMemory:
    image_file, label_file = f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte"
    with files.reading(image_file):
        pixels: Tensor = read_image_file(str(files.folder / image_file)).unsqueeze(1)
    with files.reading(label_file):
        labels: Tensor = read_label_file(str(files.folder / label_file))
    if len(pixels) != len(labels):
        raise files.corrupt(label_file, f"{len(labels)} labels for {len(pixels)} images")
    if size is not None:
        pixels = transforms.resize(pixels, [size, size], antialias=True)
    return InMemory(pixels.expand(-1, channels, -1, -1), labels)
