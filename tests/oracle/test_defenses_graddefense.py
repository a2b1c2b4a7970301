"""GradDefense's sensitivity against finite differences and the whole Jacobian; its root set."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gia_bench.defenses.graddefense import GradDefense
from gia_bench.defenses.sensitivity import LayerSize, Sensitivity, sensitivity
from gia_bench.errors import ConfigError, IncompatibleError, NonFiniteError
from gia_bench.models.functional import Victim
from gia_bench.seeding import seeded, stream
from gia_bench.values import Batch, Params, Shared

ANY: Any = None  # what these calls do not look at
SIZES = LayerSize()


def net(norm: nn.Module | None = None, dtype: torch.dtype = torch.float64) -> Victim:
    with seeded(0, "model"):
        network = nn.Sequential(
            nn.Conv2d(1, 4, 3), *([norm] if norm else []), nn.Tanh(), nn.Flatten(), nn.Linear(64, 3)
        ).to(dtype)
    return Victim(module=network, input_shape=(1, 6, 6), num_classes=3)


class Public:
    """Ten examples each of three classes, told apart by their brightness."""

    labels = torch.arange(30) % 3

    def __len__(self) -> int:
        return 30

    def images(self, indices: Tensor) -> Tensor:
        return torch.rand(30, 1, 6, 6, generator=stream(0, "public"))[indices]


def batch(count: int, dtype: torch.dtype = torch.float64) -> Batch:
    g = stream(0, "batch")
    inputs = torch.rand(count, 1, 6, 6, generator=g, dtype=dtype)
    return Batch(inputs, torch.randint(3, (count,), generator=g), torch.ones(count, dtype=dtype))


def announced(defense: GradDefense, params: Params, m: int = 1, round_index: int = 0) -> Shared:
    return defense.announce(params, defense.init_server(params), round_index, m, stream(0, "announce"), ANY)


@pytest.mark.parametrize("directions", ["ones", "random"])
@pytest.mark.parametrize("norm", [None, nn.BatchNorm2d(4)], ids=["plain", "batch_norm"])
def test_sensitivity_is_that_of_finite_differences(directions: str, norm: nn.Module | None) -> None:
    victim, root, step = net(norm), batch(3), 1e-5
    params, buffers = victim.initial()
    g = stream(0, directions)
    chosen = [{k: torch.randn(p.shape, generator=g).to(p) for k, p in params.items()} for _ in range(2)]
    if directions == "ones":
        chosen = [{k: torch.ones_like(p) for k, p in params.items()}]

    def sums(inputs: Tensor) -> Tensor:
        """[directions, tensors]"""
        weights = [p.clone().requires_grad_() for p in params.values()]
        logits, _ = victim.logits(dict(zip(params, weights, strict=True)), buffers, inputs)
        loss = nn.functional.cross_entropy(logits, root.labels, reduction="sum")
        gradients = torch.autograd.grad(loss, weights)
        named = dict(zip(params, gradients, strict=True))
        return torch.stack([torch.stack([(x * v[k]).sum() for k, x in named.items()]) for v in chosen])

    slopes = torch.zeros(len(chosen), len(params), *root.inputs.shape, dtype=torch.float64)
    for place in np.ndindex(*root.inputs.shape):
        up, down = root.inputs.clone(), root.inputs.clone()
        up[place] += step
        down[place] -= step
        slopes[(slice(None), slice(None), *place)] = (sums(up) - sums(down)) / (2 * step)
    expected = slopes.flatten(3).square().sum(-1).mean(0).sqrt().mean(-1)
    with torch.no_grad():  # as in a round
        found = sensitivity(victim, params, buffers, root, chosen)
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-8)


def test_the_sum_of_the_last_layers_gradient_says_nothing_but_its_jacobian_does() -> None:
    victim = net()
    params, _ = victim.initial()
    for directions, silent in (("ones", True), ("random", False)):
        settings = Sensitivity(root_size=20, directions=directions)
        risk = settings.calibrate(victim, Public()).measure(params, 0, stream(0))
        assert (risk[2:] < 1e-12 * risk[0]).tolist() == [silent, silent]


def test_random_directions_estimate_the_norm_of_the_whole_jacobian() -> None:
    victim, root = net(), batch(1)
    params, buffers = victim.initial()

    def gradient(inputs: Tensor) -> Params:
        return torch.func.grad(lambda p: victim.objective(p, buffers, root._replace(inputs=inputs))[0])(params)

    jacobian = torch.func.jacrev(gradient)(root.inputs)
    g = stream(0)
    signs = [{k: torch.randint(2, p.shape, generator=g).to(p) * 2 - 1 for k, p in params.items()} for _ in range(150)]
    found = sensitivity(victim, params, buffers, root, signs)
    for r, j in zip(found.tolist(), jacobian.values(), strict=True):
        assert r == pytest.approx(float(j.norm()), rel=0.25)


def test_the_bias_of_the_root_set_is_the_share_of_one_class() -> None:
    labels = torch.arange(20_000) % 10
    for bias in (0.1, 0.4, 1.0):
        rows = Sensitivity(root_size=2_000, class_bias=bias).draw_root(labels, 10)
        assert len(set(rows.tolist())) == 2_000
        shares = torch.bincount(labels[rows], minlength=10) / 2_000
        favoured = int(torch.randint(10, (), generator=stream(0, "root")))
        assert float(shares[favoured]) == pytest.approx(bias, abs=0.03)
        others = torch.cat([shares[:favoured], shares[favoured + 1 :]])
        assert torch.allclose(others, torch.full((9,), (1 - bias) / 9), atol=0.03)
    plain = Sensitivity(root_size=2_000).draw_root(labels, 10)
    assert torch.allclose(torch.bincount(labels[plain]) / 2_000, torch.full((10,), 0.1), atol=0.03)
    assert torch.equal(plain, Sensitivity(root_size=2_000).draw_root(labels, 10))
    assert not torch.equal(plain, Sensitivity(root_size=2_000, root_seed=1).draw_root(labels, 10))


def test_too_few_public_examples_are_refused_with_the_way_out() -> None:
    with pytest.raises(IncompatibleError, match=r"needs 100 public examples .* are 30; lower defense\.risk\.root_size"):
        GradDefense().calibrate(net(), Public())
    with pytest.raises(IncompatibleError, match=r"needs 20 public examples of class \d .* there are 10"):
        GradDefense(risk=Sensitivity(root_size=20, class_bias=1.0)).calibrate(net(), Public())
    assert GradDefense(risk=SIZES).calibrate(net(), Public()) == GradDefense(risk=SIZES)
    with pytest.raises(ConfigError, match="no root set yet: call calibrate"):
        announced(GradDefense(), net().initial()[0])


def test_the_risk_follows_the_rounds_parameters_and_is_kept_between_measurements() -> None:
    victim = net()
    defense = GradDefense(risk=Sensitivity(root_size=10, every=3), compensation=None).calibrate(victim, Public())
    params, _ = victim.initial()
    first = defense.announce(params, defense.init_server(params), 0, 4, stream(0), ANY)
    moved = {k: 2 * p for k, p in params.items()}
    _, state = defense.compensate(params, defense.init_server(params), first, [0.25] * 4)
    second = defense.announce(moved, state, 1, 4, stream(0), ANY)
    fourth = defense.announce(moved, state, 3, 4, stream(0), ANY)
    assert torch.equal(first["risk"], second["risk"]) and torch.equal(first["borders"], second["borders"])
    assert not torch.allclose(first["risk"], fourth["risk"])
    assert {k: (v.shape, v.dtype) for k, v in state.items()} == {
        k: (v.shape, v.dtype) for k, v in defense.init_server(params).items()
    }


def test_a_model_that_diverged_is_named_by_round_and_tensor() -> None:
    victim = net()
    params = victim.initial()[0]
    defense = GradDefense(risk=Sensitivity(root_size=10)).calibrate(victim, Public())
    with pytest.raises(NonFiniteError, match=r"Round 7: graddefense finds NaN .* sensitivity of 0\.weight"):
        defense.announce({k: p * torch.nan for k, p in params.items()}, {}, 7, 1, stream(0), ANY)
