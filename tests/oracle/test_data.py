from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.transform import resize
from sklearn.datasets import load_digits
from torchvision import datasets
from torchvision.transforms import ToTensor

from gia_bench.data.cifar import cifar10
from gia_bench.data.digits import digits
from gia_bench.data.folders import image_folder
from gia_bench.data.mnist import fashion_mnist, mnist
from gia_bench.data.source import Dataset, InMemory
from gia_bench.data.split import stratified


def test_digits_equal_scikit_images_bilinear_resize() -> None:
    data = digits()
    original = load_digits()
    splits = stratified(torch.from_numpy(original.target), 0.2, "digits")
    for source, rows in zip((data.train, data.test), splits, strict=True):
        found = source.images(torch.arange(len(source)))[:, 0].numpy()
        expected = [resize(image / 16, (16, 16), order=1, mode="edge") for image in original.images[rows.numpy()]]  # type: ignore[no-untyped-call]
        np.testing.assert_allclose(found, np.stack(expected), atol=1e-6)
        assert source.labels.tolist() == original.target[rows.numpy()].tolist()


def test_the_numbers_for_normalising_digits_are_the_measured_ones() -> None:
    data = digits()
    images = torch.cat([data.train.images(torch.arange(1437)), data.test.images(torch.arange(360))])
    assert data.mean[0] == pytest.approx(images.mean().item(), abs=5e-4)
    assert data.std[0] == pytest.approx(images.std().item(), abs=5e-4)


@pytest.mark.real_data
@pytest.mark.parametrize(("load", "kind"), [(mnist, datasets.MNIST), (fashion_mnist, datasets.FashionMNIST)])
def test_mnist_and_fashion_mnist_equal_torchvisions_items(data_root: Path, load: object, kind: type) -> None:
    assert callable(load)
    data = load(root=str(data_root), download=False)
    assert (len(data.train), len(data.test)) == (60_000, 10_000)
    for source, train in ((data.train, True), (data.test, False)):
        items = kind(data_root, train=train, transform=ToTensor())
        rows = torch.randperm(len(source), generator=torch.Generator().manual_seed(0))[:50]
        expected = [items[i] for i in rows.tolist()]
        assert torch.equal(source.images(rows), torch.stack([image for image, _ in expected]))
        assert source.labels[rows].tolist() == [label for _, label in expected]


@pytest.mark.real_data
@pytest.mark.parametrize("load", [mnist, fashion_mnist])
def test_the_numbers_for_normalising_are_the_train_splits(data_root: Path, load: object) -> None:
    assert callable(load)
    data = load(root=str(data_root), download=False)
    images = data.train.images(torch.arange(60_000))
    assert data.mean[0] == pytest.approx(images.mean().item(), abs=1e-4)
    assert data.std[0] == pytest.approx(images.std().item(), abs=1e-4)


@pytest.mark.real_data
def test_resizing_mnist_equals_pillow_up_to_rounding(data_root: Path) -> None:
    small, large = (mnist(root=str(data_root), download=False, size=size) for size in (None, 32))
    assert isinstance(small.test, InMemory)
    assert isinstance(large.test, InMemory)
    for row in range(20):
        picture = Image.fromarray(small.test.pixels[row, 0].numpy()).resize((32, 32), Image.Resampling.BILINEAR)
        difference = large.test.pixels[row, 0].int() - torch.from_numpy(np.array(picture)).int()
        assert difference.abs().max() <= 1


@pytest.fixture(scope="module")
def real_cifar10(data_root: Path) -> Dataset:
    return cifar10(root=str(data_root), download=False, verify=False)


@pytest.mark.real_data
def test_real_cifar10_has_its_published_statistics(real_cifar10: Dataset) -> None:
    assert (len(real_cifar10.train), len(real_cifar10.test)) == (50_000, 10_000)
    assert torch.bincount(real_cifar10.train.labels).tolist() == [5000] * 10
    assert torch.bincount(real_cifar10.test.labels).tolist() == [1000] * 10
    assert isinstance(real_cifar10.train, InMemory)
    pixels = real_cifar10.train.pixels
    for channel in range(3):
        values = pixels[:, channel].float() / 255
        assert values.mean().item() == pytest.approx(real_cifar10.mean[channel], abs=1e-3)
        assert values.std().item() == pytest.approx(real_cifar10.std[channel], abs=1e-3)


@pytest.mark.real_data
def test_real_cifar10_keeps_its_lossy_images_out_of_attacks(real_cifar10: Dataset, data_root: Path) -> None:
    listed = json.loads((data_root / "cifar-10-batches-py" / "lossy_index.json").read_text())["train"]
    assert len(listed) == 72
    assert real_cifar10.unfit_targets == set(listed)


@pytest.mark.real_data
def test_real_imagenet_pictures_are_read_as_pillow_reads_them(data_root: Path) -> None:
    data = image_folder(
        root=str(data_root), folder="imagenet200", class_index="imagenet200_labels.json", num_classes=1000
    )
    assert (len(data.train), len(data.test), data.shape) == (160, 40, (3, 224, 224))
    listed = json.loads((data_root / "imagenet200_labels.json").read_text())
    by_class = {entry["class_index"]: entry["file"] for entry in listed}
    for index in (0, 77, 159):
        path = data_root / "imagenet200" / by_class[int(data.train.labels[index])]
        expected = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1) / 255
        torch.testing.assert_close(data.train.images(torch.tensor([index]))[0], expected)
