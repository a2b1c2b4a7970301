"""Distances around distances against long vectors, and against the loops of Inverting Gradients' cost."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from attack_problems import problem
from torch import Tensor, nn

from gia_bench.attacks.distances import L1, Angular, Cosine, Distance, Euclidean, EuclideanMean
from gia_bench.attacks.group import Group
from gia_bench.attacks.scene import PixelSpace
from gia_bench.attacks.wrapped import SELECTIONS, Layers, Masked, Scaled, Weighted
from gia_bench.errors import IncompatibleError
from gia_bench.values import Update

SIZES = {"conv.weight": (4, 1, 3, 3), "norm.weight": (4,), "norm.bias": (4,), "last.weight": (3, 8), "last.bias": (3,)}


def update(seed: int, keep: float = 1.0) -> Update:
    draw = torch.Generator().manual_seed(seed)
    full = {k: torch.randn(shape, generator=draw, dtype=torch.float64) for k, shape in SIZES.items()}
    return {k: v * (torch.rand(v.shape, generator=draw) < keep) for k, v in full.items()}


def long(u: Update) -> Tensor:
    return torch.cat([v.flatten() for v in u.values()])


@pytest.mark.parametrize("distance", [Cosine(), Euclidean(), L1(), Angular()])
def test_a_masked_distance_is_the_distance_of_the_entries_that_were_sent(distance: Distance) -> None:
    dummy, observed = update(0), update(1, keep=0.3)
    x, y = long(dummy), long(observed)
    sent = y != 0
    assert 0 < sent.sum() < len(y)
    expected = distance({"w": x[sent]}, {"w": y[sent]})
    torch.testing.assert_close(Masked(distance=distance)(dummy, observed), expected)
    assert Masked(distance=distance)(dummy, observed) != distance(dummy, observed)


def test_a_masked_distance_does_not_move_what_was_not_sent_and_is_zero_at_the_pruned_truth() -> None:
    truth, observed = update(0), update(0, keep=0.5)
    assert Masked(distance=Cosine())(truth, observed).abs() < 1e-12
    gradient = torch.func.grad(lambda u: Masked(distance=Cosine())(u, observed))(update(1))
    for k, g in gradient.items():
        assert g[observed[k] == 0].abs().sum() == 0
    small = {k: torch.where(v == 0, 1e-7, v) for k, v in observed.items()}
    assert Masked(distance=Cosine(), threshold=1e-6)(truth, small).abs() < 1e-12


def test_an_update_without_zeros_is_matched_whole() -> None:
    assert Masked(distance=Cosine())(update(0), update(1)) == Cosine()(update(0), update(1))


@pytest.mark.parametrize(
    ("layers", "names"),
    [
        ("all", set(SIZES)),
        ("all_but_last", {"conv.weight", "norm.weight", "norm.bias"}),
        ("fc", {"last.weight", "last.bias"}),
        ("first_conv", {"conv.weight"}),
        ("all_conv", {"conv.weight"}),
    ],
)
def test_a_subset_of_layers_is_the_distance_of_those_tensors_alone(layers: str, names: set[str]) -> None:
    dummy, observed = update(0), update(1)
    part = [{k: v for k, v in u.items() if k in names} for u in (dummy, observed)]
    found = Layers(distance=EuclideanMean(), layers=layers)(dummy, observed)
    torch.testing.assert_close(found, (long(part[0]) - long(part[1])).square().mean())


def test_layers_are_named_by_the_model_and_not_by_what_is_shown() -> None:
    shown = {k: v for k, v in update(1).items() if not k.startswith("last")}
    muted = Layers(distance=Euclidean())
    torch.testing.assert_close(muted(update(0), shown), Euclidean()(update(0), shown))
    with pytest.raises(IncompatibleError, match="layers=fc selects none of the tensors that this update shows"):
        Layers(distance=Euclidean(), layers="fc")(update(0), shown)
    linear = {"0.weight": torch.ones(2, 2), "0.bias": torch.ones(2)}
    for layers in ("first_conv", "all_conv", "all_but_last"):
        with pytest.raises(IncompatibleError, match="choose another of: all, all_but_last, fc"):
            Layers(distance=Euclidean(), layers=layers)(linear, linear)


def test_the_convolutions_of_a_network_are_its_convolutions() -> None:
    p = problem(1, norm=nn.BatchNorm2d(4))
    u = p.observations[0].update
    convolutions = [k for k, m in p.victim.module.named_modules() if isinstance(m, nn.Conv2d)]
    assert SELECTIONS["all_conv"](u) == [f"{k}.{part}" for k in convolutions for part in ("weight", "bias")]
    assert SELECTIONS["first_conv"](u) == ["0.weight", "0.bias"]
    assert p.victim.head is not None
    assert SELECTIONS["fc"](u) == [p.victim.head.weight, p.victim.head.bias]


class HeadFirst(nn.Module):
    """Its head is registered before what comes before it."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.body = nn.Linear(9, 4), nn.Linear(64, 9)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x.flatten(1)).sigmoid())


@pytest.mark.parametrize(("layers", "telling"), [("all_but_last", "body"), ("fc", "head")])
def test_the_last_layer_is_the_head_wherever_a_module_has_it(layers: str, telling: str) -> None:
    p = problem(1, module=HeadFirst(), dtype=torch.float64)
    distance = Layers(distance=Cosine(), layers=layers)

    def found(spoilt: str) -> Tensor:
        update = {k: torch.ones_like(u) if k.startswith(spoilt) else u for k, u in p.observations[0].update.items()}
        seen = dataclasses.replace(p.observations[0], update=update)
        group = Group.of([seen], p.victim, [p.labels[0]], PixelSpace.of(p.victim, p.images), distance, {}, None)
        return group.losses({"pixels": p.images[:, None]})

    muted = {"body": "head", "head": "body"}[telling]
    assert found(muted).abs() < 1e-9, "the truth explains what is compared"
    assert found(telling) > 0.1


@pytest.mark.parametrize("kind", ["linear", "exp"])
def test_weights_of_layers_are_those_of_inverting_gradients(kind: str) -> None:
    dummy, observed = update(0), update(1)
    n = len(SIZES)
    weights = [(n - i) / n if kind == "linear" else math.exp(-i) for i in range(n)]
    dot = sum(w * float((dummy[k] * observed[k]).sum()) for w, k in zip(weights, SIZES, strict=True))
    norms = [
        sum(w * float(u[k].square().sum()) for w, k in zip(weights, SIZES, strict=True)) for u in (dummy, observed)
    ]
    squares = sum(w * float((dummy[k] - observed[k]).square().sum()) for w, k in zip(weights, SIZES, strict=True))
    cosine = Weighted(distance=Cosine(), weights=kind)(dummy, observed)
    assert cosine.item() == pytest.approx(1 - dot / math.sqrt(norms[0] * norms[1]))
    assert Weighted(distance=Euclidean(), weights=kind)(dummy, observed).item() == pytest.approx(squares)


def test_wrapped_distances_nest_in_any_order() -> None:
    dummy, observed = update(0), update(1, keep=0.4)
    one = Scaled(distance=Layers(distance=Masked(distance=Weighted(distance=Euclidean()))), factor=3.0)
    other = Weighted(distance=Masked(distance=Scaled(distance=Layers(distance=Euclidean()), factor=3.0)))
    torch.testing.assert_close(one(dummy, observed), other(dummy, observed))


def test_the_angle_equals_the_arc_cosine_and_has_a_derivative_where_updates_agree() -> None:
    x, y = long(update(0)), long(update(1))
    expected = torch.nn.functional.cosine_similarity(x, y, dim=0).acos() / math.pi
    torch.testing.assert_close(Angular()(update(0), update(1)), expected)
    for scale, angle in ((2.0, 0.0), (-1.0, 1.0)):
        moved = {k: scale * v.float() for k, v in update(0).items()}
        single = {k: v.float() for k, v in update(0).items()}
        gradient, value = torch.func.grad_and_value(lambda u, other=single: Angular()(u, other))(moved)
        assert value.item() == pytest.approx(angle, abs=1e-3)
        assert all(g.isfinite().all() for g in gradient.values())
    zero = {k: torch.zeros_like(v) for k, v in update(0).items()}
    assert Angular()(zero, update(0)).item() == pytest.approx(0.5)
