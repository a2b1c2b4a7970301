"""Whatever stands in conf/model: it composes, learns, can be attacked, and is the same in a loop and under vmap."""

from __future__ import annotations

from functools import cache
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import get_method, instantiate
from omegaconf import OmegaConf
from torch import Tensor
from torch.func import grad, vmap

from gia_bench.errors import ConfigError
from gia_bench.models.build import build_victim
from gia_bench.models.functional import Victim
from gia_bench.values import Batch, Buffers, Params, Update

CONF = Path(__file__).parents[2] / "conf"
MODELS = sorted(path.stem for path in (CONF / "model").glob("*.yaml"))
CLIENTS, EXAMPLES, CLASSES = 2, 2, 5


def test_there_are_models() -> None:
    assert {"lenet_zhu", "lenet", "convnet64", "conv2", "vgg11", "resnet18", "resnet34", "resnet20", "resnet32"} <= set(
        MODELS
    )
    assert {"vgg16_bn", "mlp", "torchvision"} <= set(MODELS)


def composed(model: str) -> dict[str, Any]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        settings = OmegaConf.to_container(compose(f"model/{model}").model, resolve=True)
    assert isinstance(settings, dict)
    return {str(key): value for key, value in settings.items()}


def build(model: str, channels: int, side: int) -> Victim:
    settings = composed(model)
    network = instantiate(settings.pop("network"))
    shape = (channels, side, side)
    mean, std = [0.5] * channels, [0.25] * channels
    return build_victim(network, input_shape=shape, num_classes=CLASSES, mean=mean, std=std, seed=1, **settings)


@cache
def victim(model: str) -> Victim:
    """On the smaller of two image sizes that the network takes, so that the large networks stay cheap."""
    try:
        return build(model, channels=3, side=9)
    except ConfigError:
        return build(model, channels=3, side=32)


@cache
def cohort(model: str) -> tuple[Params, Buffers, Tensor, Tensor]:
    """Parameters, each client's own buffers, images and labels."""
    params, buffers = victim(model).initial()
    draw = torch.Generator().manual_seed(2)
    images = torch.rand(CLIENTS, EXAMPLES, *victim(model).input_shape, generator=draw)
    labels = torch.randint(CLASSES, (CLIENTS, EXAMPLES), generator=draw)
    return params, {k: torch.stack([v] * CLIENTS) for k, v in buffers.items()}, images, labels


def update(model: str, params: Params, buffers: Buffers, images: Tensor, labels: Tensor) -> tuple[Update, Buffers]:
    batch = Batch(images, labels, torch.ones(EXAMPLES))
    result: tuple[Update, Buffers] = grad(lambda p: victim(model).objective(p, buffers, batch), has_aux=True)(params)
    return result


@cache
def updates_of_a_loop(model: str) -> list[tuple[Update, Buffers]]:
    params, buffers, images, labels = cohort(model)
    return [update(model, params, {k: v[i] for k, v in buffers.items()}, images[i], labels[i]) for i in range(CLIENTS)]


@pytest.mark.parametrize("model", MODELS)
def test_the_fields_are_exactly_the_factorys_signature(model: str) -> None:
    settings = composed(model)
    network = settings.pop("network")
    factory = signature(get_method(network["_target_"])).parameters
    assert network["_partial_"] is True
    assert {k for k in network if not k.startswith("_")} == {
        k for k in factory if k not in ("input_shape", "num_classes")
    }
    ours = signature(build_victim).parameters
    from_elsewhere = {"network", "input_shape", "num_classes", "mean", "std", "seed", "prepare"}
    assert set(settings) == set(ours) - from_elsewhere
    assert all(factory[k].kind is Parameter.KEYWORD_ONLY for k in network if not k.startswith("_"))


@pytest.mark.parametrize("model", MODELS)
def test_grayscale_images_of_other_sizes_get_scores(model: str) -> None:
    gray = build(model, channels=1, side=33)
    scores, _ = gray.logits(*gray.initial(), torch.rand(1, 1, 33, 33), training=False)
    assert scores.shape == (1, CLASSES)
    assert scores.isfinite().all()


@pytest.mark.parametrize("model", MODELS)
def test_every_parameter_gets_a_gradient(model: str) -> None:
    gradient, _ = updates_of_a_loop(model)[0]
    assert gradient.keys() == cohort(model)[0].keys()
    assert all(g.isfinite().all() for g in gradient.values())
    assert sum(g.count_nonzero() for g in gradient.values()) > 0


@pytest.mark.parametrize("model", MODELS)
def test_clients_under_vmap_equal_clients_in_a_loop(model: str) -> None:
    params, buffers, images, labels = cohort(model)
    together, buffers_after = vmap(lambda b, x, y: update(model, params, b, x, y))(buffers, images, labels)
    for i, (alone, after) in enumerate(updates_of_a_loop(model)):
        for name, expected in alone.items():
            torch.testing.assert_close(together[name][i], expected, rtol=1e-5, atol=1e-5 * max(1.0, _largest(alone)))
        for name, expected in after.items():
            torch.testing.assert_close(buffers_after[name][i], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model", MODELS)
def test_the_matching_distance_has_a_gradient_for_the_images(model: str) -> None:
    params, buffers, images, labels = cohort(model)
    target = updates_of_a_loop(model)[1][0]
    own = {k: v[0] for k, v in buffers.items()}

    def distance(guess: Tensor) -> Tensor:
        dummy, _ = update(model, params, own, guess, labels[0])
        return torch.stack([(dummy[k] - target[k]).square().sum() for k in dummy]).sum()

    slope = grad(distance)(images[0])
    assert slope.shape == images[0].shape
    assert slope.isfinite().all()
    assert slope.count_nonzero() > 0


def _largest(tensors: Update) -> float:
    return max(float(t.abs().max()) for t in tensors.values())
