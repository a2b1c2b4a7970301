from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, vmap

from gia_bench.errors import ConfigError
from gia_bench.models.build import Network, build_victim
from gia_bench.models.convnet import convnet
from gia_bench.models.functional import Victim
from gia_bench.models.lenet import lenet, lenet_zhu
from gia_bench.models.mlp import mlp
from gia_bench.models.prunefl import conv2, vgg11
from gia_bench.models.resnet import cifar_resnet, resnet
from gia_bench.models.vgg import vgg16_bn
from gia_bench.values import Batch, Params


def build(network: Network = lenet_zhu, side: int = 8, **settings: object) -> Victim:
    arguments = {"input_shape": (3, side, side), "num_classes": 4, "mean": [0.5] * 3, "std": [0.25] * 3, "seed": 0}
    return build_victim(network, **{**arguments, **settings})  # type: ignore[arg-type]


def first(**settings: object) -> Params:
    return build(**settings).initial()[0]  # type: ignore[arg-type]


def equal(one: Params, other: Params) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("init", ["default", "uniform_half", "kaiming_normal"])
def test_the_first_weights_are_a_function_of_the_seed_alone(init: str) -> None:
    torch.manual_seed(1)
    one = first(init=init)
    torch.manual_seed(2)
    again, other = first(init=init), first(init=init, seed=1)
    assert equal(one, again)
    assert not equal(one, other)


def test_building_a_model_leaves_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    build(init="uniform_half")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("network", [lenet_zhu, partial(cifar_resnet, depth=8)])
def test_uniform_half_fills_every_parameter_evenly_within_a_half(network: Network) -> None:
    values = torch.cat([p.flatten() for p in first(network=network, init="uniform_half").values()])
    assert values.abs().max() <= 0.5
    assert abs(values.mean()) < 0.01
    # the standard deviation of U(-0.5, 0.5) is 1 / sqrt(12); defaults and BatchNorm's ones would show
    assert values.std() == pytest.approx(12**-0.5, rel=0.02)
    assert all((p != 0).all() and (p != 1).all() for p in first(network=network, init="uniform_half").values())


def test_kaiming_normal_has_the_variance_of_he_et_al() -> None:
    weights = first(network=partial(mlp, hidden=[200]), init="kaiming_normal")["features.0.weight"]
    assert weights.var() == pytest.approx(2 / 192, rel=0.05)


def test_the_initialisation_is_of_the_networks_own_layers_and_not_of_those_that_a_defense_adds() -> None:
    plain = first(init="uniform_half")
    params = first(prepare=lambda model: nn.Sequential(model, nn.LayerNorm(4)), init="uniform_half")
    # by default a LayerNorm's weights are ones
    assert (params["1.weight"] == 1).all()
    assert equal({k.removeprefix("0."): v for k, v in params.items() if k.startswith("0.")}, plain)


@pytest.mark.parametrize(
    ("network", "side", "says"),
    [
        (convnet, 8, "from 9x9 pixels, got 8x8"),
        (vgg11, 16, "from 32x32 pixels, got 16x16"),
        (vgg16_bn, 31, "from 32x32 pixels, got 31x31"),
        (conv2, 3, "from 4x4 pixels, got 3x3"),
    ],
)
def test_an_image_that_is_too_small_is_refused_with_the_smallest_that_fits(
    network: Network, side: int, says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        build(network, side)


@pytest.mark.parametrize(("network", "side"), [(convnet, 9), (vgg11, 32), (vgg16_bn, 32), (conv2, 4)])
def test_the_smallest_image_that_is_named_does_fit(network: Network, side: int) -> None:
    victim = build(network, side)
    assert victim.logits(*victim.initial(), torch.rand(2, 3, side, side))[0].shape == (2, 4)


@pytest.mark.parametrize("network", [lenet_zhu, lenet, resnet, cifar_resnet, mlp])
def test_the_other_networks_take_any_image_even_one_that_is_not_square(network: Network) -> None:
    victim = build(network, input_shape=(3, 5, 9))
    assert victim.logits(*victim.initial(), torch.rand(2, 3, 5, 9))[0].shape == (2, 4)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"loss": "hinge"}, "model.loss='hinge' is not known. Choose one of: binary_cross_entropy, cross_entropy"),
        ({"init": "zeros"}, "model.init='zeros' is not known. Choose one of: default, kaiming_normal, uniform_half"),
        ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
        ({"input_shape": (8, 8)}, "input_shape must be"),
        ({"mean": [0.5], "normalize": True}, "mean must hold one number per channel"),
        ({"std": [0.5, 0.0, 0.5], "normalize": True}, "std must be positive"),
        ({"network": partial(resnet, depth=50)}, "depth must be one of 18, 34, got 50"),
        ({"network": partial(cifar_resnet, depth=21)}, "depth must be 6n"),
        ({"network": partial(cifar_resnet, width=0)}, "width must be at least 1"),
        ({"network": partial(mlp, hidden=[8, 0])}, "hidden must be at least 1"),
        ({"network": partial(mlp, activation="swish")}, "Choose one of: relu, sigmoid, tanh"),
        ({"network": lambda shape, classes: lenet(shape, classes + 1)}, "must give 4 scores per image"),
        ({"network": lambda shape, classes: nn.Sequential(nn.Flatten(), nn.LSTM(192, classes))}, "must return one"),
        ({"network": lambda shape, classes: nn.Conv2d(9, 4, 1)}, r"cannot take images of shape \[3, 8, 8\]"),
        ({"network": lambda shape, classes: nn.Linear(5, classes)}, r"cannot take images of shape \[3, 8, 8\].*5x5"),
    ],
)
def test_settings_that_cannot_be_are_refused_with_a_sentence(settings: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        build(**settings)  # type: ignore[arg-type]


def test_scores_do_not_change_the_buffers_that_were_given() -> None:
    victim = build(partial(cifar_resnet, depth=8))
    params, buffers = victim.initial()
    kept = copy.deepcopy(buffers)
    _, after = victim.logits(params, buffers, torch.rand(3, 3, 8, 8))
    assert equal(buffers, kept)
    assert equal(dict(victim.module.named_buffers()), kept)
    assert not torch.equal(after["bn1.running_mean"], kept["bn1.running_mean"])
    assert (after["bn1.num_batches_tracked"] == 1).all()


def test_evaluation_reads_the_buffers_and_leaves_them() -> None:
    victim = build(partial(cifar_resnet, depth=8))
    params, buffers = victim.initial()
    shifted = {k: v + 1 for k, v in buffers.items()}
    images = torch.rand(3, 3, 8, 8)
    scores, after = victim.logits(params, shifted, images, training=False)
    assert equal(after, shifted)
    assert not torch.equal(scores, victim.logits(params, buffers, images, training=False)[0])


@pytest.mark.parametrize("layer", [nn.Dropout(0.5), nn.Dropout2d(0.1), nn.AlphaDropout(0.2)])
def test_a_victim_that_draws_random_numbers_is_refused_unless_in_evaluation(layer: nn.Module) -> None:
    def network(shape: tuple[int, int, int], classes: int) -> nn.Module:
        return nn.Sequential(layer, lenet_zhu(shape, classes))

    with pytest.raises(ConfigError, match="layer '0'"):
        build(network)
    assert not build(network, training=False).training


@pytest.mark.parametrize("network", [lenet_zhu, convnet, conv2, vgg11, vgg16_bn, resnet, cifar_resnet, mlp])
def test_no_layer_works_in_place(network: Network) -> None:
    parts = list(network((3, 32, 32), 4).modules())
    assert len(parts) > 3
    assert not any(getattr(part, "inplace", False) for part in parts)


def test_binary_cross_entropy_runs_under_vmap() -> None:
    victim = build(conv2, loss="binary_cross_entropy")
    params, buffers = victim.initial()
    images, labels, mask = torch.rand(2, 3, 3, 8, 8), torch.tensor([[0, 1, 2], [3, 3, 0]]), torch.ones(3)

    def slope(x: Tensor, y: Tensor) -> Params:
        gradient: Params = grad(lambda p: victim.objective(p, buffers, Batch(x, y, mask))[0])(params)
        return gradient

    together = vmap(slope)(images, labels)
    torch.testing.assert_close(together["classifier.2.bias"][1], slope(images[1], labels[1])["classifier.2.bias"])


@pytest.mark.parametrize(
    ("network", "head"),
    [(lenet_zhu, "fc"), (convnet, "fc"), (conv2, "classifier.2"), (resnet, "linear"), (mlp, "fc")],
)
def test_the_head_is_the_layer_whose_bias_gradient_sums_to_nothing(network: Network, head: str) -> None:
    victim = build(network, side=9)
    params, buffers = victim.initial()
    batch = Batch(torch.rand(2, 3, 9, 9), torch.tensor([0, 3]), torch.ones(2))
    gradient = grad(lambda p: victim.objective(p, buffers, batch)[0])(params)
    assert victim.head == (f"{head}.weight", f"{head}.bias")
    # softmax minus one-hot sums to zero over the classes, and is negative for the true ones while scores are near equal
    leak = gradient[victim.head[1]]
    assert leak.sum().abs() < 1e-6
    assert (leak < 0).tolist() == [True, False, False, True]


def test_a_network_without_a_linear_layer_has_no_head() -> None:
    assert build(_convolutions_only).head is None


def _convolutions_only(shape: tuple[int, int, int], classes: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(shape[0], classes, kernel_size=shape[1]), nn.Flatten())


def test_only_batch_norm_in_training_couples_the_examples_of_a_batch() -> None:
    assert build(convnet, side=9).batch_coupled
    assert not build(convnet, side=9, training=False).batch_coupled
    assert not build(lenet).batch_coupled
    victim = build(convnet, side=9)
    params, buffers = victim.initial()
    images = torch.rand(2, 3, 9, 9)
    pair, alone = victim.logits(params, buffers, images)[0][:1], victim.logits(params, buffers, images[:1])[0]
    assert not torch.allclose(pair, alone)


def test_a_victim_moves_its_constants_to_another_device() -> None:
    moved = build(normalize=True).to(torch.device("meta"))
    assert moved.mean is not None
    assert moved.std is not None
    assert moved.mean.is_meta
    assert moved.std.is_meta
    assert build().to(torch.device("meta")).mean is None
