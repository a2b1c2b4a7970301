from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image

from gia_bench.data.source import Dataset, InMemory, Lazy, fingerprint, per_channel
from gia_bench.errors import ConfigError, DataError


def source(num_examples: int = 4) -> InMemory:
    return InMemory(torch.zeros(num_examples, 1, 12, 12, dtype=torch.uint8), torch.arange(num_examples))


def dataset(**changes: Any) -> Dataset:
    settings: dict[str, Any] = {
        "name": "made", "train": source(), "test": source(2), "num_classes": 4, "shape": (1, 12, 12),
        "mean": (0.0,), "std": (1.0,), "version": "none",
    }  # fmt: skip
    return Dataset(**(settings | changes))


def test_bytes_become_float32_from_0_to_1_in_the_order_asked_for() -> None:
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1, 1)
    images = InMemory(pixels, torch.zeros(3, dtype=torch.int64)).images(torch.tensor([2, 0, 1, 2]))
    assert images.dtype == torch.float32
    torch.testing.assert_close(images.flatten(), torch.tensor([1.0, 0.0, 0.2, 1.0]))


def test_images_and_labels_of_different_length_are_refused() -> None:
    with pytest.raises(DataError, match="do not fit together"):
        InMemory(torch.zeros(3, 1, 8, 8, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(DataError, match="do not fit together"):
        InMemory(torch.zeros(3, 1, 8, 8), torch.zeros(3, dtype=torch.int64), torch.zeros(4, dtype=torch.int64))


@pytest.mark.parametrize("value", [1.01, -0.01, float("nan")])
def test_float_pixels_outside_0_to_1_are_refused(value: float) -> None:
    with pytest.raises(DataError, match=r"\[0, 1\]"):
        InMemory(torch.full((1, 1, 2, 2), value), torch.zeros(1, dtype=torch.int64))


class Greys:
    """A torchvision-like dataset: item k is a grey picture of value k, wider than high; counts what is read."""

    def __init__(self) -> None:
        self.read: list[int] = []

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        self.read.append(index)
        return Image.new("L", (40, 20), index), 0


def test_a_lazy_source_reads_the_pictures_of_its_rows_at_one_size_and_in_colour() -> None:
    lazy = Lazy(Greys(), torch.tensor([51, 102, 255]), torch.tensor([0, 1, 2]), 10)
    images = lazy.images(torch.tensor([2, 0, 2]))
    assert images.shape == (3, *lazy.shape)
    torch.testing.assert_close(images[:, :, 4, 4], torch.tensor([1.0, 0.2, 1.0]).view(3, 1).expand(3, 3))


def test_a_lazy_source_reads_nothing_before_it_is_asked_and_each_picture_once_per_request() -> None:
    pictures = Greys()
    lazy = Lazy(pictures, torch.arange(9), torch.zeros(9, dtype=torch.int64), 10)
    assert len(lazy) == 9
    assert pictures.read == []
    lazy.images(torch.tensor([4, 0, 4, 0, 0]))
    assert sorted(pictures.read) == [0, 4]


def test_asking_a_source_for_nothing_gives_an_empty_batch_of_its_shape() -> None:
    nothing = torch.empty(0, dtype=torch.int64)
    lazy = Lazy(Greys(), torch.arange(2), torch.zeros(2, dtype=torch.int64), 10)
    assert lazy.images(nothing).shape == (0, 3, 10, 10)
    assert source().images(nothing).shape == (0, 1, 12, 12)


def test_a_lazy_source_cuts_out_the_centre() -> None:
    class Striped:
        def __getitem__(self, index: int) -> tuple[Image.Image, int]:
            picture = Image.new("RGB", (30, 10), (255, 255, 255))
            picture.paste((0, 0, 0), (10, 0, 20, 10))
            return picture, 0

    lazy = Lazy(Striped(), torch.arange(1), torch.zeros(1, dtype=torch.int64), 10)
    assert lazy.images(torch.tensor([0])).max() == 0


def test_normalisation_numbers_that_do_not_fit_the_channels_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"dataset\.mean has 3 numbers"):
        dataset(mean=(0.1, 0.2, 0.3))
    with pytest.raises(ConfigError, match=r"dataset\.std"):
        dataset(std=(0.0,))


def test_labels_outside_the_classes_are_refused() -> None:
    with pytest.raises(DataError, match="from 0 to 3, outside its 3 classes"):
        dataset(num_classes=3)
    assert dataset(num_classes=4).num_classes == 4


def test_an_empty_split_is_refused() -> None:
    with pytest.raises(DataError, match="test split of made is empty"):
        dataset(test=source(0))


def test_one_number_stands_for_every_channel() -> None:
    assert per_channel([0.5], 3) == (0.5, 0.5, 0.5)
    assert per_channel([1, 2, 3], 3) == (1.0, 2.0, 3.0)


def test_the_fingerprint_follows_every_pixel_and_label() -> None:
    pixels, labels = torch.zeros(4, 1, 12, 12, dtype=torch.uint8), torch.arange(4)
    changed = pixels.clone()
    changed[2, 0, 3, 3] = 1
    prints = [fingerprint(InMemory(p, y)) for p, y in ((pixels, labels), (changed, labels), (pixels, labels.flip(0)))]
    assert len(set(prints)) == 3
    assert fingerprint(InMemory(pixels.clone(), labels.clone())) == prints[0]
