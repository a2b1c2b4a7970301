"""Tiny ImageNet in its original layout, downloaded and unpacked by torchvision's own functions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import final

import torch
from PIL.Image import Image
from torchvision.datasets.utils import download_and_extract_archive

from gia_bench.data.files import Files
from gia_bench.data.folders import IMAGENET_MEAN, IMAGENET_STD, decode, lazy, open_folder
from gia_bench.data.source import Dataset, Lazy, listing, per_channel

URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
FOLDER = "tiny-imagenet-200"


@final
class _Listed:
    """Pictures whose classes stand in a list, not in their folders' names."""

    def __init__(self, paths: Sequence[Path], labels: Sequence[int]) -> None:
        self._paths, self._labels = paths, labels

    def __getitem__(self, index: int) -> tuple[Image, int]:
        return decode(self._paths[index]), self._labels[index]


def tiny_imagenet(
    *,
    root: str,
    download: bool = True,
    size: int = 64,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> Dataset:
    """100,000 + 10,000 photographs, 64x64, 200 classes in the order of their names; read from disk one by one.

    size: height and width after resizing (the DGP paper uses 224). The test split is the original's ``val``: its own
    test has no labels. Raises ``DataError`` where files are absent or corrupt. mean and std: ImageNet's.
    """
    base = Path(root).expanduser()
    files = Files(
        dataset="tiny_imagenet",
        folder=base,
        names=tuple(f"{FOLDER}/{name}" for name in ("wnids.txt", "train", "val/val_annotations.txt", "val/images")),
        archives={f"{FOLDER}.zip": MD5},
        urls=(URL,),
    )
    if files.must_fetch(download):
        with files.fetching():
            download_and_extract_archive(URL, str(base), filename=f"{FOLDER}.zip", md5=MD5)
    classes = _classes(files)
    train_folder = base / FOLDER / "train"
    pictures = open_folder(train_folder, "tiny_imagenet", f"delete {base / FOLDER} to have it unpacked again")
    if pictures.classes != classes:
        different = sorted(set(pictures.classes) ^ set(classes))
        raise files.corrupt(f"{FOLDER}/train", f"its folders and wnids.txt differ in {', '.join(different[:5])}")
    labels = torch.tensor(pictures.targets, dtype=torch.int64)
    train = lazy(pictures, labels, size, torch.arange(len(labels)))
    paths, test = _validation(files, classes, size)
    return Dataset(
        name="tiny_imagenet",
        train=train,
        test=test,
        num_classes=len(classes),
        shape=train.shape,
        mean=per_channel(mean, 3),
        std=per_channel(std, 3),
        version=listing([*(Path(path) for path, _ in pictures.samples), *paths], base),
    )


def _classes(files: Files) -> list[str]:
    name = f"{FOLDER}/wnids.txt"
    with files.reading(name):
        return sorted((files.folder / name).read_text(encoding="utf-8").split())


def _validation(files: Files, classes: Sequence[str], size: int) -> tuple[list[Path], Lazy]:
    name = f"{FOLDER}/val/val_annotations.txt"
    number = {wnid: index for index, wnid in enumerate(classes)}
    with files.reading(name):
        rows = [line.split("\t")[:2] for line in (files.folder / name).read_text(encoding="utf-8").splitlines()]
        labels = [number[wnid] for _, wnid in rows]
    paths = [files.folder / FOLDER / "val" / "images" / file for file, _ in rows]
    absent = [path for path in paths if not path.exists()]
    if absent:
        raise files.corrupt(f"{FOLDER}/val/images", f"{len(absent)} images are absent, {absent[0].name} among them")
    pictures = _Listed(paths, labels)
    return paths, Lazy(pictures, torch.arange(len(paths)), torch.tensor(labels, dtype=torch.int64), size)
