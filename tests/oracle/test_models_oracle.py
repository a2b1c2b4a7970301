"""Models against numbers counted by hand, finite differences, and trained weights of known accuracy."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad

from gia_bench.models.build import Network, build_victim
from gia_bench.models.convnet import convnet
from gia_bench.models.functional import Victim
from gia_bench.models.lenet import lenet, lenet_zhu
from gia_bench.models.mlp import mlp
from gia_bench.models.prunefl import conv2, vgg11
from gia_bench.models.resnet import cifar_resnet, resnet
from gia_bench.models.vgg import vgg16_bn
from gia_bench.values import Batch

IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def conv(channels: int, wider: int, kernel: int, *, bias: bool = True) -> int:
    return channels * wider * kernel**2 + wider * bias


def linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def norm(channels: int) -> int:
    return 2 * channels


def chain(channels: int, widths: list[int], *, batch_norm: bool) -> int:
    """3x3 convolutions one after the other."""
    total = 0
    for wider in widths:
        total += conv(channels, wider, 3) + batch_norm * norm(wider)
        channels = wider
    return total


def wide_resnet_stages(blocks: list[int]) -> int:
    """3x3 convolutions without bias, each with BatchNorm, and 1x1 projections where the width changes."""
    total = conv(3, 64, 3, bias=False) + norm(64)
    channels = 64
    for wider, count in zip([64, 128, 256, 512], blocks, strict=True):
        total += conv(channels, wider, 3, bias=False) + (2 * count - 1) * conv(wider, wider, 3, bias=False)
        total += 2 * count * norm(wider)
        if wider != channels:
            total += conv(channels, wider, 1, bias=False) + norm(wider)
        channels = wider
    return total


VGG16 = [64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
COUNTED = [
    # the figures of papers.md and of the authors' code, and the same layer by layer
    (lenet_zhu, (3, 32, 32), 10, 15_826),
    (lenet_zhu, (3, 32, 32), 100, 85_036),
    (lenet_zhu, (1, 28, 28), 10, conv(1, 12, 5) + 2 * conv(12, 12, 5) + linear(588, 10)),
    (lenet, (3, 32, 32), 10, 19_438),
    (lenet, (1, 8, 8), 10, conv(1, 12, 5) + 3 * conv(12, 12, 5) + linear(48, 10)),
    (convnet, (3, 32, 32), 10, 2_904_970),
    (convnet, (3, 32, 32), 10, chain(3, [64, 128, 128, 256, 256, 256, 256, 256], batch_norm=True) + linear(2304, 10)),
    (conv2, (1, 28, 28), 62, conv(1, 32, 5) + conv(32, 64, 5) + linear(3136, 2048) + linear(2048, 62)),
    (
        vgg11,
        (3, 32, 32),
        10,
        chain(3, [64, 128, 256, 256, 512, 512, 512, 512], batch_norm=False) + 2 * linear(512, 512) + linear(512, 10),
    ),
    (partial(resnet, depth=18), (3, 32, 32), 10, 11_173_962),
    (partial(resnet, depth=18), (3, 64, 64), 200, wide_resnet_stages([2, 2, 2, 2]) + linear(512, 200)),
    (partial(resnet, depth=34), (3, 32, 32), 10, 21_282_122),
    (partial(resnet, depth=34), (3, 32, 32), 100, wide_resnet_stages([3, 4, 6, 3]) + linear(512, 100)),
    (partial(cifar_resnet, depth=20), (3, 32, 32), 10, 269_722),
    (partial(cifar_resnet, depth=32), (3, 32, 32), 10, 464_154),
    (partial(cifar_resnet, depth=44), (3, 32, 32), 10, 658_586),
    (partial(cifar_resnet, depth=56), (3, 32, 32), 10, 853_018),
    (vgg16_bn, (3, 32, 32), 10, chain(3, VGG16, batch_norm=True) + linear(512, 10)),
    (vgg16_bn, (1, 64, 64), 10, chain(1, VGG16, batch_norm=True) + linear(512, 10)),
    (partial(mlp, hidden=[1024, 1024]), (3, 32, 32), 10, linear(3072, 1024) + linear(1024, 1024) + linear(1024, 10)),
    (partial(mlp, hidden=[]), (1, 28, 28), 10, 7_850),
]


@pytest.mark.parametrize(("network", "shape", "classes", "expected"), COUNTED)
def test_parameters_are_as_many_as_counted_by_hand(
    network: Network, shape: tuple[int, int, int], classes: int, expected: int
) -> None:
    assert sum(p.numel() for p in network(shape, classes).parameters()) == expected


def smooth_resnet(shape: tuple[int, int, int], classes: int) -> nn.Module:
    """ResNet-8 with sigmoids: finite differences of a ReLU's gradient would jump over its kinks."""
    network = cifar_resnet(shape, classes, depth=8, width=4)
    for part in network.modules():
        for name, child in part.named_children():
            if isinstance(child, nn.ReLU):
                setattr(part, name, nn.Sigmoid())
    return network


@pytest.mark.parametrize(
    "network",
    [lenet_zhu, lenet, smooth_resnet, partial(mlp, hidden=[6], activation="tanh")],
    ids=["lenet_zhu", "lenet", "smooth_resnet", "mlp"],
)
def test_the_gradient_of_the_matching_distance_agrees_with_finite_differences(network: Network) -> None:
    victim = build_victim(
        network, input_shape=(2, 8, 8), num_classes=3, mean=[0.4, 0.6], std=[0.2, 0.3], normalize=True, seed=4
    )
    distance, image, direction = _matching_problem(victim)
    step = 1e-5
    finite = (distance(image + step * direction) - distance(image - step * direction)) / (2 * step)
    analytic = (grad(distance)(image) * direction).sum()
    torch.testing.assert_close(analytic, finite, rtol=1e-5, atol=0.0)


def _matching_problem(victim: Victim) -> tuple[Callable[[Tensor], Tensor], Tensor, Tensor]:
    params, buffers = ({k: v.double() for k, v in tensors.items()} for tensors in victim.initial())
    assert victim.mean is not None and victim.std is not None
    draw = torch.Generator().manual_seed(5)
    truth, guess, direction = (
        torch.rand(4, *victim.input_shape, generator=draw, dtype=torch.float64) for _ in range(3)
    )
    labels = torch.tensor([0, 1, 2, 0])

    def update(images: Tensor) -> dict[str, Tensor]:
        batch = Batch(images, labels, torch.ones(4, dtype=torch.float64))
        gradient: dict[str, Tensor] = grad(lambda p: victim.objective(p, buffers, batch)[0])(params)
        return gradient

    target = update(truth)

    def distance(images: Tensor) -> Tensor:
        dummy = update(images)
        return torch.stack([(dummy[k] - target[k]).square().sum() for k in dummy]).sum()

    return distance, guess, direction


def test_normalisation_is_that_of_the_formula() -> None:
    mean, std = [0.1, 0.2, 0.3], [0.5, 1.0, 2.0]
    network = partial(mlp, hidden=[])
    victim = build_victim(network, input_shape=(3, 2, 2), num_classes=4, mean=mean, std=std, normalize=True, seed=0)
    params, buffers = victim.initial()
    images = torch.rand(5, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    normalised = torch.stack([(images[:, c] - mean[c]) / std[c] for c in range(3)], dim=1)
    expected = normalised.reshape(5, 12) @ params["fc.weight"].T + params["fc.bias"]
    torch.testing.assert_close(victim.logits(params, buffers, images)[0], expected)


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("depth", "file", "images", "at_least"),
    [
        # stated test accuracies 91.73, 92.63, 93.11, 93.39 %, less three standard errors of so few images
        (20, "resnet20-12fca82f.th", 500, 0.88),
        (32, "resnet32-d509ac18.th", 200, 0.87),
        (44, "resnet44-014dd654.th", 200, 0.87),
        (56, "resnet56-4bfd9763.th", 200, 0.87),
    ],
)
def test_trained_weights_reach_their_stated_accuracy(
    data_root: Path, depth: int, file: str, images: int, at_least: float
) -> None:
    with (data_root / "cifar-10-batches-py" / "test_batch").open("rb") as stream:
        batch = pickle.load(stream, encoding="bytes")
    inputs = torch.as_tensor(batch[b"data"][:images]).reshape(-1, 3, 32, 32) / 255
    victim = build_victim(
        partial(cifar_resnet, depth=depth),
        input_shape=(3, 32, 32),
        num_classes=10,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        normalize=True,
        checkpoint=data_root / "weights" / "cifar10_resnet" / file,
    )
    with torch.no_grad():
        scores, _ = victim.logits(*victim.initial(), inputs, training=False)
    accuracy = (scores.argmax(1) == torch.tensor(batch[b"labels"][:images])).double().mean()
    assert at_least < accuracy < 0.98
