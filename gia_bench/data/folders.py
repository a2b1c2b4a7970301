"""Pictures in folders, read one by one: any folder of classes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL.Image import Image
from torch import Tensor
from torchvision import datasets
from torchvision.datasets.folder import pil_loader

from gia_bench.data.files import UNREADABLE, one_line
from gia_bench.data.source import Dataset, Lazy, listing, per_channel
from gia_bench.data.split import stratified
from gia_bench.errors import ConfigError, DataError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def image_folder(
    *,
    root: str,
    folder: str = "images",
    size: int = 224,
    test_fraction: float = 0.2,
    class_index: str | None = None,
    num_classes: int | None = None,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> Dataset:
    """Any folder with one subfolder of pictures per class, RGB, shorter side resized to ``size``, centre cut out.

    folder: below ``root``, or absolute; test_fraction: a fixed stratified split, the folder having none. Classes are
    numbered in the order of the subfolders' names, or by ``class_index``, a JSON file below ``root``, for folders
    that hold some of a larger model's classes: {"number": [subfolder, name]} (ImageNet's usual file) or
    [{"wnid": subfolder, "class_index": number}]. num_classes: null counts the subfolders; 1000 for ImageNet models.
    Raises ``DataError`` where the folder is absent or empty, and names a picture that cannot be read. mean and std:
    ImageNet's.
    """
    base = Path(root).expanduser()
    place = base / folder
    pictures = open_folder(
        place, "image_folder", "set dataset.folder to a folder with one subfolder of images per class"
    )
    numbers = dict(pictures.class_to_idx) if class_index is None else _class_numbers(base / class_index, pictures)
    labels = torch.tensor([numbers[pictures.classes[k]] for k in pictures.targets], dtype=torch.int64)
    total = max(numbers.values()) + 1 if num_classes is None else num_classes
    train, test = (lazy(pictures, labels, size, rows) for rows in stratified(labels, test_fraction, place.name))
    return Dataset(
        name=place.name,
        train=train,
        test=test,
        num_classes=total,
        shape=train.shape,
        mean=per_channel(mean, 3),
        std=per_channel(std, 3),
        version=listing([Path(path) for path, _ in pictures.samples], place),
    )


def open_folder(place: Path, name: str, way_out: str) -> datasets.ImageFolder:
    """torchvision's listing of a folder of classes. Raises ``DataError`` with the way out."""
    try:
        return datasets.ImageFolder(place, loader=decode)
    except OSError as e:
        raise DataError(f"{name} finds no classes of images in {place} ({one_line(e)}); {way_out}.") from e


def decode(path: str | Path) -> Image:
    """One picture in RGB. Raises ``DataError`` that names a file that is absent or broken."""
    try:
        picture: Image = pil_loader(path)
    except UNREADABLE as e:
        raise DataError(f"The image {path} cannot be read ({one_line(e)}); replace it or take it away.") from e
    return picture


def lazy(pictures: datasets.ImageFolder, labels: Tensor, size: int, rows: Tensor) -> Lazy:
    """The chosen ``rows`` of a folder as one split; ``labels`` are of the whole folder."""
    if size < 1:
        raise ConfigError(f"dataset.size={size} must be at least 1 pixel.")
    return Lazy(pictures, rows, labels[rows], size)


def _class_numbers(path: Path, pictures: datasets.ImageFolder) -> dict[str, int]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict):
            known = {str(entry[0]): int(number) for number, entry in content.items()}
        else:
            known = {str(entry["wnid"]): int(entry["class_index"]) for entry in content}
    except (OSError, ValueError, TypeError, LookupError) as e:
        raise DataError(
            f"dataset.class_index={path} is not readable as {{'number': [subfolder, name]}} or "
            f"[{{'wnid': subfolder, 'class_index': number}}] ({one_line(e)})."
        ) from e
    unknown = sorted(set(pictures.classes) - set(known))
    if unknown:
        raise DataError(f"dataset.class_index={path} has no number for the subfolders {', '.join(unknown[:5])}.")
    return {name: known[name] for name in pictures.classes}
