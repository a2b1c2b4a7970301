"""The bottleneck that PRECODE puts into a model: its penalty, its size, its place."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import Tensor, nn

from gia_bench.conf_path import CONF
from gia_bench.defenses.precode import PRECODE
from gia_bench.errors import IncompatibleError
from gia_bench.models.bottleneck import VariationalBottleneck
from gia_bench.models.build import build_victim
from gia_bench.models.lenet import lenet_zhu
from gia_bench.models.mlp import mlp
from gia_bench.seeding import seeded


def test_the_penalty_is_beta_times_the_divergence_in_bits_of_every_example() -> None:
    with seeded(0, "bottleneck"):
        module = VariationalBottleneck(7, latent_size=5, beta=0.25).double()
        x = torch.randn(4, 7, dtype=torch.float64) * 3
    mu, s = module.encoder(x).split(5, dim=1)
    normal = torch.distributions.Normal(mu, nn.functional.softplus(s))
    bits = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).sum(1) / math.log(2)
    torch.testing.assert_close(module(x).penalty, 0.25 * bits)


def test_a_vanishing_deviation_keeps_the_penalty_and_its_two_derivatives_finite() -> None:
    module = VariationalBottleneck(1, latent_size=1, beta=1.0)
    with torch.no_grad():
        module.encoder.weight.copy_(torch.tensor([[0.0], [1.0]]))
        module.encoder.bias.zero_()

    def penalty(s: Tensor) -> Tensor:
        result: Tensor = module(s.view(1, 1)).penalty.sum()
        return result

    for s in (-200.0, -90.0, -31.0, -29.0, 50.0):
        at = torch.tensor(s)
        slope = torch.func.grad(penalty)(at)
        assert penalty(at).isfinite() and torch.func.grad(torch.func.grad(penalty))(at).isfinite()
        # d KL / d s = -softplus'(s) / sigma + sigma softplus'(s), which goes to -1 below and to s above
        assert float(slope.detach()) * math.log(2) == pytest.approx(-1 if s < 0 else s - 1 / s, rel=1e-4)


def test_the_parameters_are_those_counted_by_hand() -> None:
    d, K = 588, 256
    with seeded(0, "model"):
        plain, wide = lenet_zhu((1, 28, 28), 10), mlp((3, 32, 32), 10)
    lenet = sum(p.numel() for p in PRECODE().prepare_model(plain).parameters())
    assert lenet - sum(p.numel() for p in plain.parameters()) == d * 2 * K + 2 * K + K * d + d == 452_684
    whole = (3072 * 1024 + 1024) + (1024 * 1024 + 1024) + (1024 * 512 + 512) + (256 * 1024 + 1024) + (1024 * 10 + 10)
    assert sum(p.numel() for p in PRECODE().prepare_model(wide).parameters()) == whole


def test_the_given_network_is_left_alone_and_its_weights_are_kept() -> None:
    with seeded(0, "model"):
        plain = lenet_zhu((1, 28, 28), 10)
        before = {k: v.clone() for k, v in plain.state_dict().items()}
        changed = PRECODE().prepare_model(plain).state_dict()
    assert all(torch.equal(v, before[k]) for k, v in plain.state_dict().items()) and plain.state_dict().keys() == (
        before.keys()
    )
    for name, value in before.items():
        assert torch.equal(changed[name.replace("fc.", "fc.head.")], value)
    assert [k for k in changed if "bottleneck" in k and changed[k].numel()] == [
        f"fc.bottleneck.{layer}.{kind}" for layer in ("encoder", "decoder") for kind in ("weight", "bias")
    ]


@pytest.mark.parametrize("name", sorted(p.stem for p in (CONF / "model").glob("*.yaml")))
def test_every_model_of_the_configuration_takes_the_bottleneck_before_its_head(name: str) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        network = instantiate(compose(f"model/{name}").model.network)
    model = build_victim(
        network, input_shape=(3, 32, 32), num_classes=512, mean=[0.5] * 3, std=[0.25] * 3,
        prepare=PRECODE().prepare_model,
    )  # fmt: skip
    PRECODE().check_victim(model)
    params, buffers = model.initial()
    assert model.head is not None
    own = [name for name in model.head if name is not None]
    assert [*params][-len(own) :] == own, "512 = 2 K outputs are not mistaken for the scores"
    assert [b.nbytes for k, b in buffers.items() if k.endswith("bottleneck.noise")] == [0]


@pytest.mark.parametrize("init", ["default", "uniform_half", "kaiming_normal"])
def test_the_new_layers_start_as_torchs_linear_layers_do_and_all_others_as_without_a_defense(init: str) -> None:
    settings: dict[str, Any] = {"input_shape": (1, 28, 28), "num_classes": 10, "mean": [0.5], "std": [0.5]}
    made = build_victim(partial(lenet_zhu), init=init, prepare=PRECODE().prepare_model, **settings).initial()[0]
    plain = build_victim(partial(lenet_zhu), init=init, **settings).initial()[0]
    assert all(torch.equal(made[name.replace("fc.", "fc.head.")], value) for name, value in plain.items())
    for layer, inputs in (("encoder", 588), ("decoder", 256)):
        for kind in ("weight", "bias"):
            values = made[f"fc.bottleneck.{layer}.{kind}"]
            assert 0.98 < float(values.abs().max()) * math.sqrt(inputs) <= 1.0001
            assert float(values.std()) * math.sqrt(3 * inputs) == pytest.approx(1, rel=0.1)


@pytest.mark.parametrize("init", ["default", "uniform_half"])
def test_the_first_scores_of_a_model_with_a_bottleneck_are_of_the_size_that_its_head_gives_features(init: str) -> None:
    """Layers from U(-0.5, 0.5) would multiply features by 12 and then by 9, and one step would throw the scores far."""
    settings: dict[str, Any] = {"input_shape": (1, 28, 28), "num_classes": 10, "mean": [0.5], "std": [0.5]}
    model = build_victim(partial(lenet_zhu), init=init, prepare=PRECODE().prepare_model, **settings)
    images = torch.rand(20, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    assert float(model.logits(*model.initial(), images)[0].abs().max()) < 10


class Ends(nn.Module):
    """A network without a linear layer."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)


@pytest.mark.parametrize(
    "network",
    [
        Ends(),
        nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.ReLU()),
        nn.Sequential(nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), Ends()),
    ],
    ids=["no linear layer", "something after it", "something after its sequence"],
)
def test_a_model_that_does_not_end_in_a_linear_layer_is_refused_with_the_way_out(network: nn.Module) -> None:
    with pytest.raises(IncompatibleError, match=r"does not end in one .* choose a model that does \(lenet"):
        PRECODE().prepare_model(network)
