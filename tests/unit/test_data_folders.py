from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from data_formats import write_picture, write_tiny_imagenet
from PIL import Image

from gia_bench.data.folders import image_folder
from gia_bench.data.source import Dataset
from gia_bench.data.tiny_imagenet import tiny_imagenet
from gia_bench.errors import ConfigError, DataError


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for k, name in enumerate(("cat", "dog")):
        for i in range(5):
            write_picture(tmp_path / "images" / name / f"{i}.png", seed=10 * k + i, size=(50, 30))
    return tmp_path


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    write_tiny_imagenet(tmp_path / "tiny-imagenet-200", ["n03", "n01", "n02"])
    return tmp_path


def test_a_folder_of_classes_becomes_a_dataset(pictures: Path) -> None:
    data = image_folder(root=str(pictures), size=24, test_fraction=0.4)
    assert (data.name, data.num_classes, data.shape) == ("images", 2, (3, 24, 24))
    assert torch.bincount(data.train.labels).tolist() == [3, 3]
    assert torch.bincount(data.test.labels).tolist() == [2, 2]
    images = data.train.images(torch.arange(6))
    assert images.shape == (6, 3, 24, 24)
    assert 0 <= images.min() < images.max() <= 1


@pytest.mark.parametrize(
    "content",
    [
        {"7": ["cat", "tabby"], "2": ["dog", "terrier"]},
        [{"wnid": "cat", "class_index": 7}, {"wnid": "dog", "class_index": 2}],
    ],
    ids=["ImageNet's own file", "a list"],
)
def test_classes_take_their_numbers_from_a_file(pictures: Path, content: object) -> None:
    (pictures / "classes.json").write_text(json.dumps(content))
    data = image_folder(root=str(pictures), class_index="classes.json", num_classes=1000)
    assert data.num_classes == 1000
    assert set(data.train.labels.tolist()) == {2, 7}


def test_a_file_of_classes_that_is_broken_or_incomplete_is_named(pictures: Path) -> None:
    path = pictures / "classes.json"
    for content, problem in (('{"7": ', "is not readable"), ('{"7": ["cat", "tabby"]}', "has no number for .* dog")):
        path.write_text(content)
        with pytest.raises(DataError, match=rf"class_index=.*classes\.json {problem}"):
            image_folder(root=str(pictures), class_index="classes.json")


def test_too_few_classes_are_refused(pictures: Path) -> None:
    with pytest.raises(DataError, match="outside its 1 classes"):
        image_folder(root=str(pictures), num_classes=1)


def test_an_absent_or_empty_folder_is_told_with_the_way_out(pictures: Path) -> None:
    (pictures / "empty").mkdir()
    (pictures / "half" / "cat").mkdir(parents=True)
    for folder in ("absent", "empty", "half"):
        with pytest.raises(DataError, match=rf"{folder} .*set dataset\.folder"):
            image_folder(root=str(pictures), folder=folder)


def read_all(data: Dataset) -> None:
    for source in (data.train, data.test):
        source.images(torch.arange(len(source)))


def test_a_broken_picture_is_named_when_it_is_read(pictures: Path) -> None:
    path = pictures / "images" / "cat" / "0.png"
    content = path.read_bytes()
    for broken in (content[: len(content) // 2], b"no picture"):
        path.write_bytes(broken)
        with pytest.raises(DataError, match=r"cat/0\.png cannot be read"):
            read_all(image_folder(root=str(pictures)))


def test_a_size_below_one_pixel_is_refused(pictures: Path) -> None:
    with pytest.raises(ConfigError, match=r"dataset\.size=0"):
        image_folder(root=str(pictures), size=0)


def test_the_version_of_a_folder_follows_its_files(pictures: Path) -> None:
    before = image_folder(root=str(pictures)).version
    assert image_folder(root=str(pictures)).version == before
    write_picture(pictures / "images" / "dog" / "one_more.png", seed=1)
    assert image_folder(root=str(pictures)).version != before


def test_tiny_imagenet_is_read_in_its_original_layout(tiny: Path) -> None:
    data = tiny_imagenet(root=str(tiny), download=False)
    assert (data.num_classes, data.shape) == (3, (3, 64, 64))
    assert data.train.labels.tolist() == [0, 0, 1, 1, 2, 2]
    # the annotations list n02, n01, n03
    assert data.test.labels.tolist() == [1, 0, 2]
    for source, index, path in (
        (data.train, 2, "train/n02/images/n02_0.JPEG"),
        (data.test, 2, "val/images/val_0.JPEG"),
    ):
        expected = torch.tensor(list(Image.open(tiny / "tiny-imagenet-200" / path).tobytes())) / 255
        found = source.images(torch.tensor([index]))[0].permute(1, 2, 0).flatten()
        torch.testing.assert_close(found, expected)


def test_a_half_unpacked_tiny_imagenet_is_told(tiny: Path) -> None:
    (tiny / "tiny-imagenet-200" / "val" / "images" / "val_1.JPEG").unlink()
    with pytest.raises(DataError, match=r"1 images are absent, val_1\.JPEG"):
        tiny_imagenet(root=str(tiny))
    (tiny / "tiny-imagenet-200" / "train" / "n02").rename(tiny / "elsewhere")
    with pytest.raises(DataError, match=r"its folders and wnids\.txt differ in n02"):
        tiny_imagenet(root=str(tiny))


def test_annotations_of_an_unknown_class_are_told(tiny: Path) -> None:
    path = tiny / "tiny-imagenet-200" / "val" / "val_annotations.txt"
    path.write_text("val_0.JPEG\tn99\t0\t0\t63\t63\n")
    with pytest.raises(DataError, match=r"val_annotations\.txt is corrupt .*n99"):
        tiny_imagenet(root=str(tiny))


def test_an_absent_tiny_imagenet_is_told_with_folder_files_and_address(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"wnids\.txt.*http://cs231n\.stanford\.edu/tiny-imagenet-200\.zip"):
        tiny_imagenet(root=str(tmp_path), download=False)
