from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from data_formats import random_pixels, write_cifar, write_mnist, write_svhn
from numpy.typing import NDArray
from torchvision import datasets

from gia_bench.data.cifar import cifar10, cifar100
from gia_bench.data.mnist import fashion_mnist, mnist
from gia_bench.data.source import InMemory
from gia_bench.data.svhn import svhn
from gia_bench.errors import ConfigError, DataError


@pytest.fixture
def mnist_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.MNIST, "resources", write_mnist(tmp_path / "MNIST" / "raw"))
    return tmp_path


@pytest.fixture
def cifar_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_cifar(tmp_path, datasets.CIFAR10, "labels", 5, monkeypatch)
    return tmp_path


def test_mnist_is_unpacked_without_a_network_and_read(mnist_root: Path) -> None:
    data = mnist(root=str(mnist_root), download=False)
    assert (len(data.train), len(data.test), data.num_classes, data.shape) == (6, 4, 10, (1, 28, 28))
    assert data.test.labels.tolist() == [0, 1, 2, 3]
    expected = torch.from_numpy(random_pixels(4, 28, 28, seed=4)) / 255
    torch.testing.assert_close(data.test.images(torch.arange(4))[:, 0], expected)


def test_mnist_can_be_resized_and_made_three_equal_channels(mnist_root: Path) -> None:
    data = mnist(root=str(mnist_root), size=32, channels=3)
    images = data.train.images(torch.arange(6))
    assert images.shape == (6, *data.shape) == (6, 3, 32, 32)
    assert torch.equal(images[:, 0], images[:, 2])
    assert data.mean == (0.1307,) * 3


@pytest.mark.parametrize("setting", [{"channels": 2}, {"size": 0}])
def test_mnist_refuses_settings_out_of_range(mnist_root: Path, setting: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=r"dataset\."):
        mnist(root=str(mnist_root), download=False, **setting)  # type: ignore[arg-type]


def test_a_corrupt_archive_is_named_and_left_alone(mnist_root: Path) -> None:
    path = mnist_root / "MNIST" / "raw" / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-9])
    before = path.read_bytes()
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz is corrupt"):
        mnist(root=str(mnist_root))
    assert path.read_bytes() == before


@pytest.mark.parametrize("name", ["t10k-images-idx3-ubyte", "train-labels-idx1-ubyte"])
@pytest.mark.parametrize("damage", ["cut off", "empty", "noise"])
def test_a_corrupt_unpacked_file_is_named(mnist_root: Path, name: str, damage: str) -> None:
    mnist(root=str(mnist_root))
    path = mnist_root / "MNIST" / "raw" / name
    content = path.read_bytes()
    path.write_bytes({"cut off": content[:-3], "empty": b"", "noise": b"\x7f" * len(content)}[damage])
    with pytest.raises(DataError, match=rf"{name} is corrupt"):
        mnist(root=str(mnist_root))


def test_labels_that_do_not_match_the_images_are_told(mnist_root: Path) -> None:
    mnist(root=str(mnist_root))
    raw = mnist_root / "MNIST" / "raw"
    (raw / "train-labels-idx1-ubyte").write_bytes((raw / "t10k-labels-idx1-ubyte").read_bytes())
    with pytest.raises(DataError, match="4 labels for 6 images"):
        mnist(root=str(mnist_root))


@pytest.mark.parametrize(
    ("load", "words"),
    [
        (mnist, ["MNIST/raw", "train-images-idx3-ubyte", f"{datasets.MNIST.mirrors[0]}t10k-images-idx3-ubyte.gz"]),
        (fashion_mnist, ["FashionMNIST/raw", "t10k-labels-idx1-ubyte", datasets.FashionMNIST.mirrors[0]]),
        (cifar10, ["cifar-10-batches-py/data_batch_1", "batches.meta", datasets.CIFAR10.url]),
        (cifar100, ["cifar-100-python/train", "meta", datasets.CIFAR100.url]),
        (svhn, ["train_32x32.mat", "test_32x32.mat", datasets.SVHN.split_list["train"][0]]),
    ],
    ids=["mnist", "fashion_mnist", "cifar10", "cifar100", "svhn"],
)  # fmt: skip
def test_absent_files_are_told_with_folder_files_and_address(tmp_path: Path, load: object, words: list[str]) -> None:
    assert callable(load)
    with pytest.raises(DataError) as caught:
        load(root=str(tmp_path), download=False)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert [word for word in [str(tmp_path), *words] if word not in sentence] == []


def test_cifar10_is_read_with_its_checksums(cifar_root: Path) -> None:
    data = cifar10(root=str(cifar_root), download=False)
    assert (len(data.train), len(data.test), data.num_classes, data.shape) == (25, 5, 10, (3, 32, 32))
    assert data.version.startswith("sha256:")
    assert (data.notes, data.unfit_targets) == ("", frozenset())


def test_a_cifar10_that_is_not_canonical_is_told_with_the_way_out(cifar_root: Path) -> None:
    path = cifar_root / "cifar-10-batches-py" / "data_batch_3"
    batch = pickle.loads(path.read_bytes())
    path.write_bytes(pickle.dumps({**batch, "filenames": []}, protocol=2))
    with pytest.raises(DataError, match=r"data_batch_3 is corrupt .*dataset\.verify=false"):
        cifar10(root=str(cifar_root))
    data = cifar10(root=str(cifar_root), verify=False)
    assert data.version.startswith("unverified sha256:")
    assert "verify=false" in data.notes


def test_reading_cifar10_unverified_gives_what_torchvision_gives(cifar_root: Path) -> None:
    verified, unverified = (cifar10(root=str(cifar_root), verify=verify) for verify in (True, False))
    for one, other in ((verified.train, unverified.train), (verified.test, unverified.test)):
        assert isinstance(one, InMemory)
        assert isinstance(other, InMemory)
        assert torch.equal(one.pixels, other.pixels)
        assert torch.equal(one.labels, other.labels)


class Intruder:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise SystemExit('code from a data file ran')",)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x02}q\x00",
        pickle.dumps({"data": Intruder()}),
        pickle.dumps({"data": [1], "labels": [1]}),
        pickle.dumps([1]),
    ],
    ids=["empty", "cut off", "code", "no array", "a list"],
)
def test_a_broken_or_hostile_unverified_batch_is_named_and_runs_nothing(cifar_root: Path, content: bytes) -> None:
    (cifar_root / "cifar-10-batches-py" / "test_batch").write_bytes(content)
    with pytest.raises(DataError, match="test_batch is corrupt"):
        cifar10(root=str(cifar_root), verify=False)


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (random_pixels(2, 3072), "1 labels for 2 images"),
        (np.ones((1, 3072)), "TypeError"),
        (random_pixels(1, 9), "reshape"),
    ],
    ids=["a label too few", "floats", "too small"],
)
def test_an_unverified_batch_with_the_wrong_content_is_named(
    cifar_root: Path, data: NDArray[np.generic], problem: str
) -> None:
    batch = cifar_root / "cifar-10-batches-py" / "data_batch_2"
    batch.write_bytes(pickle.dumps({"data": data, "labels": [1]}, protocol=2))
    with pytest.raises(DataError, match=f"data_batch_2 is corrupt .*{problem}"):
        cifar10(root=str(cifar_root), verify=False)


def test_a_folder_that_may_not_be_entered_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "exists", refuse)
    with pytest.raises(DataError, match="PermissionError"):
        mnist(root=str(tmp_path))


def test_images_listed_as_lossy_are_unfit_targets(cifar_root: Path) -> None:
    listed = cifar_root / "cifar-10-batches-py" / "lossy_index.json"
    listed.write_text('{"train": [3, 17], "test": [1]}')
    data = cifar10(root=str(cifar_root))
    assert data.unfit_targets == {3, 17}
    assert "2 train images are not bit-exact" in data.notes
    listed.write_text('{"test": []}')
    with pytest.raises(DataError, match=r"lossy_index\.json is not readable"):
        cifar10(root=str(cifar_root))


def test_cifar100_is_read_with_its_fine_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar(tmp_path, datasets.CIFAR100, "fine_labels", 7, monkeypatch)
    data = cifar100(root=str(tmp_path), download=False)
    assert (len(data.train), data.num_classes) == (7, 100)
    pixels = random_pixels(7, 3072, seed=sum(b"test")).reshape(7, 3, 32, 32)
    torch.testing.assert_close(data.test.images(torch.arange(7)), torch.from_numpy(pixels) / 255)
    (tmp_path / "cifar-100-python" / "train").write_bytes(b"")
    with pytest.raises(DataError, match="cifar-100-python/train is corrupt") as caught:
        cifar100(root=str(tmp_path))
    assert "verify" not in str(caught.value)


def test_svhn_is_read_with_digit_0_as_class_0(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = write_svhn(tmp_path, datasets.SVHN, monkeypatch)
    data = svhn(root=str(tmp_path), download=False)
    assert data.test.labels.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]
    expected = torch.from_numpy(written["test"]).permute(0, 3, 1, 2) / 255
    torch.testing.assert_close(data.test.images(torch.arange(10)), expected)
    (tmp_path / "test_32x32.mat").write_bytes(b"MATLAB 5.0")
    with pytest.raises(DataError, match=r"test_32x32\.mat is corrupt"):
        svhn(root=str(tmp_path))
