"""SVHN, through torchvision."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torchvision import datasets
from torchvision.datasets.utils import check_integrity

from gia_bench.data.files import Files
from gia_bench.data.source import Dataset, InMemory, fingerprint, per_channel


def svhn(
    *,
    root: str,
    download: bool = True,
    mean: Sequence[float] = (0.4377, 0.4438, 0.4728),
    std: Sequence[float] = (0.1980, 0.2010, 0.1970),
) -> Dataset:
    """73,257 + 26,032 house numbers, 32x32 colour, 10 classes (digit 0 is class 0).

    Raises ``DataError`` where files are absent or corrupt. Source: Netzer et al. 2011; mean and std of the train split,
    as commonly used.
    """
    listed = {split: datasets.SVHN.split_list[split] for split in ("train", "test")}
    files = Files(
        dataset="svhn",
        folder=Path(root).expanduser(),
        names=tuple(name for _, name, _ in listed.values()),
        archives={},
        urls=tuple(url for url, _, _ in listed.values()),
    )
    fetch = files.must_fetch(download)
    sources = []
    for split, (_, name, md5) in listed.items():
        path = files.folder / name
        if fetch and not path.exists():
            with files.fetching():
                datasets.SVHN(files.folder, split, download=True)
        if not check_integrity(path, md5):
            raise files.corrupt(name, f"its MD5 is not {md5}")
        loaded = datasets.SVHN(files.folder, split)
        sources.append(InMemory(torch.tensor(loaded.data), torch.tensor(loaded.labels)))
    train, test = sources
    return Dataset(
        name="svhn",
        train=train,
        test=test,
        num_classes=10,
        shape=train.shape,
        mean=per_channel(mean, 3),
        std=per_channel(std, 3),
        version=fingerprint(train, test),
    )
