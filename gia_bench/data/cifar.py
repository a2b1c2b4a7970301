"""CIFAR-10 and CIFAR-100, through torchvision."""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from torchvision import datasets
from torchvision.datasets.utils import check_integrity

from gia_bench.data.files import Files
from gia_bench.data.source import Dataset, InMemory, fingerprint, per_channel
from gia_bench.errors import DataError

LOSSY = "lossy_index.json"
"""Beside the batches: {"train": [...], "test": [...]}, the images that are not the original pixels."""

ARRAY_PARTS = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),  # the same since numpy 2
    ("_codecs", "encode"),  # bytes written by Python 3 in the old format
}
"""What a pickled array of bytes is made of."""


def cifar10(
    *,
    root: str,
    download: bool = True,
    verify: bool = True,
    mean: Sequence[float] = (0.49147, 0.48226, 0.44677),
    std: Sequence[float] = (0.24703, 0.24349, 0.26159),
) -> Dataset:
    """50,000 + 10,000 photographs, 32x32, 10 classes.

    verify: torchvision's MD5 check of the files; without it ``version`` and ``notes`` say so. Where
    ``lossy_index.json`` lies beside the batches, its train images are ``unfit_targets``. Raises ``DataError`` where
    files are absent, corrupt or, with ``verify``, not the canonical ones. Source: Krizhevsky 2009; mean and std of
    Inverting Gradients' code (the DGP paper's: 0.4914, 0.4822, 0.4465 and 0.2023, 0.1994, 0.2010).
    """
    kind = datasets.CIFAR10
    files = _files(kind, "cifar10", root)
    if files.must_fetch(download):
        with files.fetching():
            kind(files.folder, download=True)
    if verify:
        train, test = _verified(kind, files, "; or set dataset.verify=false to use the files as they are")
    else:
        train, test = (_unverified(files, kind, names) for names in (kind.train_list, kind.test_list))
    unfit = _lossy(files, kind.base_folder)
    notes = [] if verify else ["CIFAR-10 loaded without torchvision's MD5 check (dataset.verify=false)."]
    notes += [f"{len(unfit)} train images are not bit-exact and are never attacked ({LOSSY})."] if unfit else []
    return Dataset(
        name="cifar10",
        train=train,
        test=test,
        num_classes=10,
        shape=train.shape,
        mean=per_channel(mean, 3),
        std=per_channel(std, 3),
        version=fingerprint(train, test) if verify else f"unverified {fingerprint(train, test)}",
        unfit_targets=unfit,
        notes=" ".join(notes),
    )


def cifar100(
    *,
    root: str,
    download: bool = True,
    mean: Sequence[float] = (0.50716, 0.48669, 0.44120),
    std: Sequence[float] = (0.26733, 0.25644, 0.27615),
) -> Dataset:
    """50,000 + 10,000 photographs, 32x32, 100 fine classes. Raises ``DataError`` where files are absent or corrupt.

    Source: Krizhevsky 2009; mean and std of Inverting Gradients' code.
    """
    kind = datasets.CIFAR100
    files = _files(kind, "cifar100", root)
    if files.must_fetch(download):
        with files.fetching():
            kind(files.folder, download=True)
    train, test = _verified(kind, files)
    return Dataset(
        name="cifar100",
        train=train,
        test=test,
        num_classes=100,
        shape=train.shape,
        mean=per_channel(mean, 3),
        std=per_channel(std, 3),
        version=fingerprint(train, test),
    )


# Any: torchvision's classes carry no types
def _files(kind: Any, name: str, root: str) -> Files:
    needed = [entry[0] for entry in (*kind.train_list, *kind.test_list)] + [kind.meta["filename"]]
    return Files(
        dataset=name,
        folder=Path(root).expanduser(),
        names=tuple(f"{kind.base_folder}/{needs}" for needs in needed),
        archives={kind.filename: kind.tgz_md5},
        urls=(kind.url,),
    )


def _verified(kind: Any, files: Files, instead: str = "") -> tuple[InMemory, InMemory]:
    checksums = {entry[0]: entry[1] for entry in (*kind.train_list, *kind.test_list)}
    checksums[kind.meta["filename"]] = kind.meta["md5"]
    for name, md5 in checksums.items():
        if not check_integrity(files.folder / kind.base_folder / name, md5):
            raise files.corrupt(f"{kind.base_folder}/{name}", f"its MD5 is not {md5}", instead)
    train, test = (kind(files.folder, train=flag) for flag in (True, False))
    return _pixels(train.data, train.targets), _pixels(test.data, test.targets)


def _pixels(data: Any, targets: Sequence[int]) -> InMemory:
    return InMemory(torch.from_numpy(data).permute(0, 3, 1, 2).contiguous(), torch.tensor(targets, dtype=torch.int64))


def _unverified(files: Files, kind: Any, entries: Sequence[Sequence[str]]) -> InMemory:
    pixels, labels = [], []
    for name in (f"{kind.base_folder}/{entry[0]}" for entry in entries):
        with files.reading(name), (files.folder / name).open("rb") as stream:
            batch = _OnlyArrays(stream, encoding="latin1").load()
            pixels.append(torch.from_numpy(batch["data"].reshape(-1, 3, 32, 32).astype(np.uint8, casting="safe")))
            labels.append(torch.tensor(batch["labels"], dtype=torch.int64))
            if len(pixels[-1]) != len(labels[-1]):
                raise ValueError(f"{len(labels[-1])} labels for {len(pixels[-1])} images")
    return InMemory(torch.cat(pixels), torch.cat(labels))


@final
class _OnlyArrays(pickle.Unpickler):
    """Reads numpy arrays and nothing else: a file that nobody verified must not be able to run code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ARRAY_PARTS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no CIFAR file needs")
        return super().find_class(module, name)


def _lossy(files: Files, folder: str) -> frozenset[int]:
    path = files.folder / folder / LOSSY
    if not path.exists():
        return frozenset()
    try:
        return frozenset(int(index) for index in json.loads(path.read_text(encoding="utf-8"))["train"])
    except (OSError, ValueError, TypeError, KeyError) as e:
        raise DataError(f"{path} is not readable as {{'train': [indices], 'test': [indices]}} ({e}).") from e
