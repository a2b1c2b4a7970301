from __future__ import annotations

import shutil
import socket
from pathlib import Path

import pytest
from data_formats import md5, pack_tar, pack_zip, serving, write_cifar, write_mnist, write_svhn, write_tiny_imagenet
from torchvision import datasets

from gia_bench.data import tiny_imagenet as tiny
from gia_bench.data.cifar import cifar10, cifar100
from gia_bench.data.mnist import fashion_mnist, mnist
from gia_bench.data.svhn import svhn
from gia_bench.errors import DataError


@pytest.fixture
def nowhere() -> str:
    """An address at which nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{taken.getsockname()[1]}/"


def test_fashion_mnist_is_downloaded_and_unpacked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.FashionMNIST, "resources", write_mnist(tmp_path / "server"))
    with serving(tmp_path / "server") as address:
        monkeypatch.setattr(datasets.FashionMNIST, "mirrors", [address])
        first = fashion_mnist(root=str(tmp_path / "root"))
    # the server is gone: the second time must not need it
    assert fashion_mnist(root=str(tmp_path / "root")).version == first.version
    assert len(first.train) == 6


def test_cifar10_is_downloaded_and_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar(tmp_path / "made", datasets.CIFAR10, "labels", 3, monkeypatch)
    archive = tmp_path / "server" / datasets.CIFAR10.filename
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", pack_tar(tmp_path / "made", datasets.CIFAR10.base_folder, archive))
    with serving(tmp_path / "server") as address:
        monkeypatch.setattr(datasets.CIFAR10, "url", f"{address}{archive.name}")
        assert len(cifar10(root=str(tmp_path / "root")).train) == 15


def test_cifar100_is_unpacked_from_an_archive_fetched_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar(tmp_path / "made", datasets.CIFAR100, "fine_labels", 3, monkeypatch)
    archive = tmp_path / "root" / datasets.CIFAR100.filename
    packed = pack_tar(tmp_path / "made", datasets.CIFAR100.base_folder, archive)
    monkeypatch.setattr(datasets.CIFAR100, "tgz_md5", packed)
    assert len(cifar100(root=str(tmp_path / "root"), download=False).train) == 3


def test_svhn_downloads_only_the_file_that_is_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_svhn(tmp_path / "server", datasets.SVHN, monkeypatch)
    (tmp_path / "root").mkdir()
    shutil.move(tmp_path / "server" / "train_32x32.mat", tmp_path / "root")
    with serving(tmp_path / "server") as address:
        listed = {k: [f"{address}{name}", name, check] for k, (_, name, check) in datasets.SVHN.split_list.items()}
        monkeypatch.setattr(datasets.SVHN, "split_list", listed)
        data = svhn(root=str(tmp_path / "root"))
    assert (len(data.train), len(data.test)) == (12, 10)


def test_tiny_imagenet_is_downloaded_and_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny_imagenet(tmp_path / "made" / tiny.FOLDER, ["n01", "n02"])
    archive = tmp_path / "server" / f"{tiny.FOLDER}.zip"
    monkeypatch.setattr(tiny, "MD5", pack_zip(tmp_path / "made", tiny.FOLDER, archive))
    with serving(tmp_path / "server") as address:
        monkeypatch.setattr(tiny, "URL", f"{address}{archive.name}")
        data = tiny.tiny_imagenet(root=str(tmp_path / "root"))
    assert (len(data.train), len(data.test), data.num_classes) == (4, 2, 2)


def test_an_archive_fetched_by_hand_is_unpacked_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny_imagenet(tmp_path / "made" / tiny.FOLDER, ["n01", "n02"])
    archive = tmp_path / "root" / f"{tiny.FOLDER}.zip"
    monkeypatch.setattr(tiny, "MD5", pack_zip(tmp_path / "made", tiny.FOLDER, archive))
    assert len(tiny.tiny_imagenet(root=str(tmp_path / "root"), download=False).train) == 4


def test_without_a_network_the_sentence_tells_what_to_fetch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nowhere: str
) -> None:
    monkeypatch.setattr(datasets.MNIST, "mirrors", [nowhere])
    monkeypatch.setattr(tiny, "URL", f"{nowhere}tiny-imagenet-200.zip")
    for load, address in ((mnist, f"{nowhere}train-images-idx3-ubyte.gz"), (tiny.tiny_imagenet, tiny.URL)):
        with pytest.raises(DataError, match=f"the download failed.*{address}") as caught:
            load(root=str(tmp_path))
        assert "\n" not in str(caught.value)


def test_a_server_without_the_file_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "server").mkdir()
    with serving(tmp_path / "server") as address:
        monkeypatch.setattr(datasets.CIFAR10, "url", f"{address}cifar-10-python.tar.gz")
        with pytest.raises(DataError, match=r"the download failed: HTTPError.*404"):
            cifar10(root=str(tmp_path / "root"))


def test_a_download_that_arrives_broken_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny_imagenet(tmp_path / "made" / tiny.FOLDER, ["n01", "n02"])
    archive = tmp_path / "server" / f"{tiny.FOLDER}.zip"
    pack_zip(tmp_path / "made", tiny.FOLDER, archive)
    archive.write_bytes(archive.read_bytes()[:-20])
    with serving(tmp_path / "server") as address:
        monkeypatch.setattr(tiny, "URL", f"{address}{archive.name}")
        with pytest.raises(DataError, match="the download failed: RuntimeError: File not found or corrupted"):
            tiny.tiny_imagenet(root=str(tmp_path / "root"))
        # even with the right checksum a zip without its end cannot be unpacked
        monkeypatch.setattr(tiny, "MD5", md5(archive))
        with pytest.raises(DataError, match="the download failed: BadZipFile"):
            tiny.tiny_imagenet(root=str(tmp_path / "root"))


def test_a_data_root_that_is_a_file_is_told(tmp_path: Path, nowhere: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.MNIST, "mirrors", [nowhere])
    (tmp_path / "root").write_text("not a folder")
    with pytest.raises(DataError, match="NotADirectoryError"):
        mnist(root=str(tmp_path / "root"))
