"""The matching loss and its gradient against plain loops of autograd, and against finite differences."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from attack_problems import Problem, double_backward_loss, problem
from torch import Tensor, nn

from gia_bench.attacks.arithmetic import PLAIN
from gia_bench.attacks.distances import L1, Cosine, Distance, Euclidean, EuclideanMean, LayerCosine
from gia_bench.attacks.group import Group, Seen
from gia_bench.attacks.inverting_gradients import inverting_gradients
from gia_bench.attacks.memory import Counted
from gia_bench.attacks.optimizers import Variables
from gia_bench.attacks.priors import Norm, PaddedTotalVariation, TotalVariation
from gia_bench.attacks.scene import Candidate, PixelSpace, Scene
from gia_bench.errors import IncompatibleError
from gia_bench.models.convnet import convnet
from gia_bench.models.functional import cross_entropy
from gia_bench.models.lenet import lenet
from gia_bench.models.resnet import cifar_resnet, resnet
from gia_bench.models.vit import vit_april
from gia_bench.values import Batch, Update


def group_of(p: Problem, *, joint: bool = False, max_batch: int | None = None) -> Group:
    space = PixelSpace.of(p.victim, p.images)
    labels = [None] * len(p.labels) if joint else list(p.labels)
    priors = {"total_variation": TotalVariation(weight=0.1)}
    return Group.of(p.observations, p.victim, labels, space, Cosine(), priors, max_batch)


def guesses(p: Problem, restarts: int) -> Tensor:
    V, *shape = p.images.shape
    return torch.randn(V, restarts, *shape, generator=torch.Generator().manual_seed(7), dtype=p.images.dtype)


@pytest.mark.parametrize(
    "norm", [None, nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4), nn.LayerNorm([4, 4, 4])], ids=repr
)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("normalised", [False, True])
def test_the_gradient_equals_a_loop_of_double_backward_passes(
    norm: nn.Module | None, training: bool, normalised: bool
) -> None:
    """In float64, with BatchNorm in both modes, and in normalised coordinates."""
    p = problem(3, batch=2, norm=norm, normalised=normalised, dtype=torch.float64)
    p = dataclasses.replace(p, victim=dataclasses.replace(p.victim, training=training))
    pixels = guesses(p, restarts=2)
    loss, gradient = group_of(p).evaluate({"pixels": pixels})
    # candidates one by one are computed without vmap
    alone, apart = group_of(p, max_batch=1).evaluate({"pixels": pixels})
    torch.testing.assert_close(alone, loss, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(apart["pixels"], gradient["pixels"], rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(group_of(p).losses({"pixels": pixels}), loss, rtol=1e-9, atol=1e-12)
    # the way that is quicker, where it is right
    chosen, slope = group_of(p).computed(PLAIN, {"pixels": pixels}).evaluate({"pixels": pixels})
    torch.testing.assert_close(chosen, loss, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(slope["pixels"], gradient["pixels"], rtol=1e-8, atol=1e-12)
    for v, observation in enumerate(p.observations):
        for t in range(2):
            z = pixels[v, t].clone().requires_grad_()
            images = z * 0.25 + 0.4 if normalised else z
            expected = double_backward_loss(p.victim, observation, images, p.labels[v])
            dx, dy = z[..., 1:] - z[..., :-1], z[..., 1:, :] - z[..., :-1, :]
            expected = expected + 0.1 * (dx.abs().mean() + dy.abs().mean())
            torch.testing.assert_close(loss[v, t], expected.detach(), rtol=1e-9, atol=1e-12)
            expected_gradient = torch.autograd.grad(expected, z)[0]
            torch.testing.assert_close(gradient["pixels"][v, t], expected_gradient, rtol=1e-8, atol=1e-12)


class Doubled(nn.Module):
    """Uses its weights in a way that has no rule."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 64, generator=torch.Generator().manual_seed(2)))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x.flatten(1).sigmoid(), 2 * self.weight)


@pytest.mark.parametrize("wrong", [False, True])
@pytest.mark.parametrize("name", ["_layerwise_step", "_quick_step"])
def test_one_backward_pass_for_all_candidates_is_used_only_where_it_agrees(
    name: str, wrong: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through some normalisations under vmap it does not."""
    p = problem(3, module=None if name == "_layerwise_step" else Doubled(), dtype=torch.float64)
    pixels, calls, quick = {"pixels": guesses(p, restarts=2)}, [], getattr(Group, name)
    if name == "_layerwise_step" and wrong:
        monkeypatch.setattr(Group, "_quick_step", Group._step)  # what comes next, and is right

    def watched(group: Group, variables: Variables, seen: Seen) -> tuple[Variables, Tensor]:
        calls.append(len(variables["pixels"]))
        slope, loss = quick(group, variables, seen)
        # wrong for one restart of two
        factor = torch.tensor([1.0, 1.01 if wrong else 1.0]).view(1, 2, 1, 1, 1, 1)
        return {"pixels": slope["pixels"] * factor}, loss

    monkeypatch.setattr(Group, name, watched)
    group = group_of(p).computed(PLAIN, pixels)
    assert calls == [2], "compared once"
    loss, gradient = group.evaluate(pixels)
    assert len(calls) == (1 if wrong else 2)
    expected = group_of(p).evaluate(pixels)
    torch.testing.assert_close(loss, expected[0], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradient["pixels"], expected[1]["pixels"], rtol=1e-8, atol=1e-12)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "resnet20": (lambda: cifar_resnet((3, 16, 16), 4, width=4), "_step", "_layerwise_step"),
    "resnet18": (lambda: resnet((3, 16, 16), 4, width=4), "_step", "_layerwise_step"),
    "convnet": (lambda: convnet((3, 16, 16), 4, width=4), "_step", "_layerwise_step"),
    "padded by a word": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding="same"), nn.Flatten(), nn.Linear(1024, 4)),
        *2 * ("_quick_step",),
    ),
    "vit_april": (lambda: vit_april((3, 16, 16), 4, patch_size=8, dim=12, heads=2), "_step", "_step"),
    "lenet": (lambda: lenet((3, 16, 16), 4), "_layerwise_step", "_layerwise_step"),
    "mlp": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(768, 9), nn.ReLU(inplace=True), nn.Linear(9, 4)),)
    + 2 * ("_layerwise_step",),
}
"""Networks of the zoo, and how they are searched where they train and in evaluation mode."""


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_the_zoo_are_searched_with_their_true_gradient(name: str, training: bool) -> None:
    """Deep ones hide a wrong second derivative of a normalisation among what single precision rounds: in double."""
    make, *ways = NETWORKS[name]
    p = problem(2, batch=2, shape=(3, 16, 16), module=make(), dtype=torch.float64)
    p = dataclasses.replace(p, victim=dataclasses.replace(p.victim, training=training))
    pixels, group = {"pixels": guesses(p, restarts=2)}, group_of(p)
    chosen = group.computed(PLAIN, pixels)
    assert getattr(chosen.step, "__name__", "") == ways[0 if training else 1]
    (loss, gradient), (expected, true) = chosen.evaluate(pixels), group.evaluate(pixels)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    scale = float(true["pixels"].abs().max())
    torch.testing.assert_close(gradient["pixels"], true["pixels"], rtol=0, atol=1e-9 * scale)


def test_a_loss_that_depends_on_no_variable_has_no_slope() -> None:
    p = problem(1, dtype=torch.float64)

    def constant(dummy: Update, observed: Update) -> Tensor:
        return observed["0.bias"].sum()

    group = Group.of(p.observations, p.victim, list(p.labels), PixelSpace.of(p.victim, p.images), constant, {}, None)
    pixels = {"pixels": guesses(p, restarts=1)}
    _, gradient = group.computed(PLAIN, pixels).evaluate(pixels)
    assert not gradient["pixels"].any()


def test_nothing_is_mapped_to_find_out_what_is_right_where_memory_is_short() -> None:
    p = problem(3, norm=nn.BatchNorm2d(4))
    pixels = {"pixels": guesses(p, restarts=2)}
    one = group_of(p, max_batch=1)
    with Counted() as tried:
        chosen = one.computed(PLAIN, pixels)
    with Counted() as used:
        chosen.evaluate(pixels)
    assert tried.peak <= used.peak


@pytest.mark.parametrize("norm", [None, nn.BatchNorm2d(4)])
def test_the_gradient_equals_finite_differences_for_pixels_and_joint_labels(norm: nn.Module | None) -> None:
    p = problem(2, shape=(1, 4, 4), dtype=torch.float64, norm=norm)
    group, pixels = group_of(p, joint=True), guesses(p, restarts=1)
    variables = {"pixels": pixels, "labels": torch.randn(2, 1, 1, 4, dtype=torch.float64)}
    _, gradient = group.evaluate(variables)
    for name, value in variables.items():
        for v in range(2):
            for i in range(value[v].numel()):
                values = []
                for sign in (1, -1):
                    moved = value.clone()
                    moved[v].view(-1)[i] += sign * 1e-6
                    values.append(group.evaluate({**variables, name: moved})[0][v, 0])
                slope = (values[0] - values[1]) / 2e-6
                torch.testing.assert_close(gradient[name][v].view(-1)[i], slope, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("max_batch", [1, 2, 3, 5, 100])
def test_every_chunk_size_gives_the_same_losses_and_gradients(max_batch: int) -> None:
    p = problem(3, dtype=torch.float64)
    variables = {"pixels": guesses(p, restarts=2)}
    whole, chunked = group_of(p).evaluate(variables), group_of(p, max_batch=max_batch).evaluate(variables)
    torch.testing.assert_close(whole, chunked, rtol=1e-12, atol=1e-15)


def test_candidates_that_are_not_wanted_leave_the_wanted_ones_unchanged() -> None:
    p = problem(3, dtype=torch.float64)
    variables = {"pixels": guesses(p, restarts=1)}
    loss, gradient = group_of(p).evaluate(variables)
    some, some_gradient = group_of(p).evaluate(variables, torch.tensor([[True], [False], [True]]))
    torch.testing.assert_close(some[[0, 2]], loss[[0, 2]])
    torch.testing.assert_close(some_gradient["pixels"][[0, 2]], gradient["pixels"][[0, 2]])
    assert some[1] == torch.inf


def test_client_and_attacker_call_one_loss_object() -> None:
    calls = []

    def counted(logits: Tensor, labels: Tensor) -> Tensor:
        calls.append(labels.dtype)
        return cross_entropy(logits, labels)

    p = problem(1)
    victim = dataclasses.replace(p.victim, loss=counted)
    o = p.observations[0]
    victim.objective(o.params, o.buffers, Batch(p.images[0], p.labels[0], torch.ones(1)))
    assert len(calls) == 1
    inverting_gradients(steps=1).reconstruct(o, victim)
    assert len(calls) > 1


def test_distances_equal_their_formulas_on_one_long_vector() -> None:
    draw = torch.Generator().manual_seed(0)
    a, b = ({k: torch.randn(n, generator=draw) for k, n in (("w", 7), ("b", 3))} for _ in range(2))
    x, y = torch.cat(list(a.values())).double(), torch.cat(list(b.values())).double()
    cosine = torch.nn.functional.cosine_similarity
    expected: dict[Distance, Tensor] = {
        Euclidean(): ((x - y) ** 2).sum(),
        EuclideanMean(): ((x - y) ** 2).mean(),
        L1(): (x - y).abs().sum(),
        Cosine(): 1 - cosine(x, y, dim=0),
        LayerCosine(): 1 - (cosine(a["w"], b["w"], dim=0) + cosine(a["b"], b["b"], dim=0)) / 2,
    }
    for distance, value in expected.items():
        torch.testing.assert_close(distance(a, b).double(), value.double(), rtol=1e-5, atol=1e-6)
        assert distance(b, b).abs() < 1e-6


@pytest.mark.parametrize("distance", [Cosine(), LayerCosine()])
@pytest.mark.parametrize("zero", ["dummy", "observed"])
def test_a_zero_update_has_a_finite_angle_and_a_finite_gradient(distance: Cosine | LayerCosine, zero: str) -> None:
    dummy = torch.zeros(3) if zero == "dummy" else torch.ones(3)
    observed = torch.zeros(3) if zero == "observed" else torch.ones(3)
    gradient, value = torch.func.grad_and_value(lambda d: distance({"w": d}, {"w": observed}))(dummy)
    assert value == 1
    assert gradient.isfinite().all()


def test_priors_equal_numpy_written_by_hand_in_both_scales_of_total_variation() -> None:
    x = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    n = x.numpy().astype("float64")
    candidate, scene = Candidate(x, x, torch.zeros(2)), Scene(problem(1).victim, problem(1).observations[0])
    down = abs(n[:, :, 1:] - n[:, :, :-1])
    right = abs(n[:, :, :, 1:] - n[:, :, :, :-1])
    assert TotalVariation(weight=0.5)(candidate, scene).item() == pytest.approx(0.5 * (down.mean() + right.mean()))
    # with zeros behind the borders, the last row and column count as differences, and every pixel has two
    total = down.sum() + right.sum() + abs(n[:, :, -1]).sum() + abs(n[:, :, :, -1]).sum()
    padded = PaddedTotalVariation(weight=0.5)(candidate, scene).item()
    assert padded == pytest.approx(0.5 * (total / n.size + 2e-8), rel=1e-6)
    assert Norm(weight=0.5)(candidate, scene).item() == pytest.approx(0.25 * (n**2).mean())


@pytest.mark.parametrize(("inner", "outer"), [(1.0, 1.0), (2.0, 0.5)])
def test_variation_of_opponent_colours_equals_a_convolution_with_difference_kernels(inner: float, outer: float) -> None:
    x = torch.randn(2, 3, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    scene = Scene(problem(1).victim, problem(1).observations[0])
    prior = PaddedTotalVariation(weight=0.2, inner=inner, outer=outer, double_opponents=True)

    red, green, blue = x.unbind(1)
    planes = torch.stack([red, green, blue, red - green, red - blue, green - blue], dim=1).flatten(0, 1)[:, None]
    kernels = torch.zeros(2, 1, 3, 3, dtype=x.dtype)
    kernels[0, 0, 1, 1] = kernels[1, 0, 1, 1] = -1
    kernels[0, 0, 2, 1] = kernels[1, 0, 1, 2] = 1
    differences = torch.nn.functional.conv2d(planes, kernels, padding=1).abs() + 1e-8
    expected = 0.2 * differences.pow(inner).sum(1).pow(outer).mean()

    torch.testing.assert_close(prior(Candidate(x, x, torch.zeros(2)), scene), expected, rtol=1e-9, atol=0)
    grey = x[:, :1]
    plain = dataclasses.replace(prior, double_opponents=False)
    one = (p(Candidate(grey, grey, torch.zeros(2)), scene) for p in (prior, plain))
    assert len({float(value) for value in one}) == 1, "a grey image has no opponent colours"


def test_opponent_colours_of_two_channels_are_refused() -> None:
    p = problem(1, shape=(2, 8, 8))
    attack = inverting_gradients(steps=1, priors={"tv": PaddedTotalVariation(weight=0.2, double_opponents=True)})
    with pytest.raises(IncompatibleError, match="double_opponents is for images of 1 or 3 channels, and these have 2"):
        attack.reconstruct_many(p.observations, p.victim, seeds=[0])
