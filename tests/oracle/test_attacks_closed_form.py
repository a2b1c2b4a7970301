"""R-GAP and APRIL: exact where the equations determine the image, honest where they do not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from attack_problems import Problem, problem, psnr_db, sigmoid_net
from torch import nn

from gia_bench.attacks.april import April
from gia_bench.attacks.base import Attack
from gia_bench.attacks.beginnings import beginnings, hypotheses
from gia_bench.attacks.chain import links
from gia_bench.attacks.least_squares import least_squares, numerical_rank
from gia_bench.attacks.rank_analysis import rank_analysis
from gia_bench.attacks.rgap import RGAP
from gia_bench.data.cifar import cifar10
from gia_bench.defenses.base import Client
from gia_bench.defenses.dgp import DGP
from gia_bench.errors import ConfigError, IncompatibleError
from gia_bench.models.cnn6 import cnn6
from gia_bench.models.functional import Victim, binary_cross_entropy, cross_entropy
from gia_bench.models.mlp import mlp
from gia_bench.models.vit import vit_april
from gia_bench.seeding import seeded
from gia_bench.threat import Knowledge
from gia_bench.values import Batch, Observation, Update

SMALL = (8, 12, 12, 12, 16, 16)
Build = Callable[[], nn.Module]


def made(build: Build) -> nn.Module:
    with seeded(0, "closed form"):
        return build()


def small_cnn6(classes: int = 4) -> nn.Module:
    return made(lambda: cnn6((1, 8, 8), classes, channels=SMALL))


def small_vit(side: int = 8, *, depth: int = 2, heads: int = 4, position_std: float = 1.0) -> nn.Module:
    return made(lambda: vit_april((1, side, side), 4, dim=68, depth=depth, heads=heads, position_std=position_std))


def attacked(attack: Attack, p: Problem) -> tuple[float, float]:
    """PSNR and score of the first victim, whose label must be found."""
    found = attack.reconstruct(p.observations[0], p.victim)
    assert found.failure is None
    assert torch.equal(found.labels, p.labels[0])  # type: ignore[arg-type]
    return psnr_db(found.inputs, p.images[0]).item(), found.score


def real_picture(data_root: Path, net: nn.Module, side: int) -> Problem:
    """The first test image of CIFAR-10, cut to its middle, as one float32 update."""
    data = cifar10(root=str(data_root), download=False, verify=False).test
    start = (32 - side) // 2
    image = data.images(torch.tensor([0]))[..., start : start + side, start : start + side]
    label = data.labels[:1]
    victim = Victim(module=net, input_shape=(3, side, side), num_classes=10)
    params, _ = victim.initial()
    batch = Batch(image, label, torch.ones(1))
    update = torch.func.grad(lambda q: victim.objective(q, {}, batch)[0])(params)
    return Problem(victim, [Observation(params=params, update=update, num_examples=1)], image[None], label[None])


CHAINS: dict[str, Build] = {
    "cnn6": small_cnn6,
    "two classes": lambda: small_cnn6(2),
    "sigmoid and biases": lambda: made(lambda: sigmoid_net((1, 8, 8), 4)),
    "fully connected": lambda: made(lambda: mlp((1, 8, 8), 4, hidden=(40, 20), activation="tanh")),
    "dilated and rectangular": lambda: made(
        lambda: nn.Sequential(
            nn.Conv2d(1, 6, (3, 2), stride=(1, 2), padding=(2, 0), dilation=(2, 1)),
            nn.LeakyReLU(0.1),
            nn.Flatten(),
            nn.Linear(192, 4, bias=False),
        )
    ),
}


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("name", CHAINS)
def test_r_gap_finds_the_image_and_label_above_60_db_in_any_chain(name: str, normalised: bool) -> None:
    net = CHAINS[name]()
    classes = 2 if name == "two classes" else 4
    p = problem(1, module=net, classes=classes, normalised=normalised, dtype=torch.float64)
    psnr, score = attacked(RGAP(), p)
    assert psnr > 60
    assert score < 1e-9


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_r_gap_in_the_papers_own_setting_one_score_and_a_logistic_loss(label: float) -> None:
    victim = Victim(module=small_cnn6(1).double(), input_shape=(1, 8, 8), num_classes=1, loss=binary_cross_entropy)
    image = problem(1, dtype=torch.float64).images[0]
    params, _ = victim.initial()
    batch = Batch(image, torch.tensor([[label]]).double(), torch.ones(1).double())
    update = torch.func.grad(lambda q: victim.objective(q, {}, batch)[0])(params)
    found = RGAP().reconstruct(Observation(params=params, update=update, num_examples=1), victim)
    assert psnr_db(found.inputs, image).item() > 60
    assert found.labels is not None
    assert found.labels.tolist() == [int(label)]


def test_float32_updates_are_enough_when_both_kinds_of_equations_are_of_one_size() -> None:
    p = problem(1, module=small_cnn6())
    balanced, as_they_are = (attacked(RGAP(balanced=b), p)[0] for b in (True, False))
    assert balanced > 60
    assert balanced > as_they_are + 10


@pytest.mark.parametrize("mu", [-3.0, -0.2, 0.3, 2.5])
@pytest.mark.parametrize("y", [-1, 1])
def test_the_beginning_solves_the_papers_equation_in_mu(mu: float, y: int) -> None:
    draw = torch.Generator().manual_seed(1)
    weight, x = torch.randn(1, 9, generator=draw).double(), torch.randn(9, generator=draw).double()
    x = x * (y * mu / (weight[0] @ x))  # y f(x) = mu
    gradient = -y / (1 + torch.tensor(mu).double().exp()) * x[None]
    found = beginnings(weight, None, gradient, None, binary_cross_entropy, hypotheses(1), most=8)
    assert all(b.misfit < 1e-9 for b in found)
    mine = [b for b in found if torch.allclose(b.inputs, x) and int(b.label) == (y + 1) // 2]
    assert len(mine) == 1
    # -mu / (1 + e^mu) is monotone below 0; above it all values but the lowest are taken twice; each with both signs
    assert len(found) == (2 if mu < 0 else 4)


def test_with_three_classes_or_more_there_is_one_beginning() -> None:
    draw = torch.Generator().manual_seed(2)
    weight, x = torch.randn(5, 9, generator=draw).double(), torch.randn(9, generator=draw).double()
    slopes = (weight @ x).softmax(0) - torch.eye(5)[3]
    found = beginnings(weight, None, slopes[:, None] * x, None, cross_entropy, hypotheses(5), most=8)
    assert len(found) == 1
    torch.testing.assert_close(found[0].inputs, x)
    torch.testing.assert_close(found[0].slopes, slopes)
    assert int(found[0].label.argmax()) == 3


def test_a_layers_equations_hold_for_the_input_that_made_them() -> None:
    net = CHAINS["dilated and rectangular"]()
    link = links(problem(1, module=net, dtype=torch.float64).victim)[0]
    params = {k: v.detach().requires_grad_() for k, v in net.named_parameters()}
    x = torch.rand(1, 1, 8, 8, dtype=torch.float64)
    layer = net[0]  # type: ignore[index]
    out = layer(x)
    slopes = torch.randn(out.shape, dtype=torch.float64)
    gradient = torch.autograd.grad(out, layer.weight, slopes)[0]
    plain = {k: v.detach() for k, v in params.items()}
    a, b = link.equations(plain, out.detach().flatten(), slopes.flatten(), gradient, balanced=False)
    torch.testing.assert_close(a @ x.flatten(), b)


def test_least_squares_equals_the_pseudo_inverse_whatever_the_rank() -> None:
    draw = torch.Generator().manual_seed(3)
    full = torch.randn(9, 4, generator=draw).double()
    short = torch.cat([full, full[:, :1] - full[:, 1:2]], 1)
    for matrix, rank in ((full, 4), (short, 4), (full.T, 4)):
        values = torch.randn(len(matrix), generator=draw).double()
        torch.testing.assert_close(least_squares(matrix, values, 1e-12), torch.linalg.pinv(matrix) @ values)
        assert numerical_rank(matrix, 1e-12) == rank


def test_rank_analysis_tells_where_r_gap_fails_although_its_image_has_the_very_same_gradient() -> None:
    draw = {"dtype": torch.float64, "classes": 4}
    good = problem(1, module=small_cnn6(), **draw)  # type: ignore[arg-type]
    ranks = rank_analysis(good.victim, good.observations[0].params, good.images[0, 0])
    assert [r.unknowns for r in ranks] == [64, 8 * 25, 12 * 9, 12 * 9, 12 * 9, 16 * 4]
    assert [r.output_equations for r in ranks] == [8 * 25, 12 * 9, 12 * 9, 12 * 9, 16 * 4, 16 * 4]
    assert all(r.determined for r in ranks)

    few = made(lambda: nn.Sequential(nn.Conv2d(1, 1, 3, 2, 1), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(16, 4)))
    bad = problem(1, module=few, **draw)  # type: ignore[arg-type]
    (rank,) = rank_analysis(bad.victim, bad.observations[0].params, bad.images[0, 0])
    # without a bias <weight, its gradient> = <slopes, outputs> for any input: one equation less than there seem to be
    assert (rank.unknowns, rank.output_equations, rank.gradient_equations, rank.rank) == (64, 16, 9, 16 + 9 - 1)
    assert not rank.determined
    psnr, score = attacked(RGAP(), bad)
    assert psnr < 20
    assert score < 1e-15


@pytest.mark.parametrize(
    ("layers", "sentence"),
    [
        ([nn.Conv2d(1, 4, 3), nn.MaxPool2d(2)], "cannot go through MaxPool2d '1'; take model=cnn6"),
        ([nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)], "cannot go through BatchNorm2d '1'"),
        ([nn.Conv2d(1, 4, 3), nn.ReLU()], "cannot go through ReLU '1'"),
        ([nn.Conv2d(1, 4, 3), nn.LeakyReLU(0.0)], "cannot go through LeakyReLU '1'"),
        ([nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3, groups=2)], "cannot go through Conv2d '1'"),
        ([nn.Conv2d(1, 4, 3, padding="same")], "cannot go through Conv2d '0'"),
        ([nn.Conv2d(1, 4, 8), nn.Flatten()], "ends with a linear layer"),
    ],
)
def test_r_gap_refuses_what_cannot_be_undone(layers: list[nn.Module], sentence: str) -> None:
    victim = Victim(module=nn.Sequential(*layers), input_shape=(1, 8, 8), num_classes=4)
    with pytest.raises(IncompatibleError, match=sentence):
        RGAP().check_victim(victim)


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_april_finds_the_image_above_60_db(dtype: torch.dtype, normalised: bool) -> None:
    psnr, score = attacked(April(), problem(1, module=small_vit(), normalised=normalised, dtype=dtype))
    assert psnr > 60
    assert score < 1e-4


def test_april_fails_where_the_positions_gradient_has_too_low_a_rank_for_float32() -> None:
    # one encoder with one head: at most a query, a key and a value direction; positions near 0: tokens nearly alike
    nets = (small_vit(32), small_vit(32, depth=1, heads=1), small_vit(32, position_std=0.02))
    found, ranks = [], []
    for net in nets:
        p = problem(1, shape=(1, 32, 32), module=net)
        found.append(attacked(April(), p)[0])
        ranks.append(numerical_rank(p.observations[0].update["position"].double(), 1e-6))
    assert found[0] > 60 > 30 > max(found[1:])
    assert ranks[0] == 65 > max(ranks[1:])


def test_april_refuses_other_models_and_tokens_that_are_too_narrow() -> None:
    narrow = made(lambda: vit_april((1, 8, 8), 4, dim=12))
    cases = [(sigmoid_net((1, 8, 8), 4), "take model=vit_april"), (narrow, "model.network.dim to 16")]
    for net, sentence in cases:
        with pytest.raises(IncompatibleError, match=sentence):
            April().check_victim(Victim(module=net, input_shape=(1, 8, 8), num_classes=4))
    with pytest.raises(ConfigError, match="labels='joint'"):
        April(labels="joint")
    assert April(labels="known").requires == Knowledge.NUM_EXAMPLES | Knowledge.LABELS


@pytest.mark.parametrize(("attack", "net"), [(RGAP(), small_cnn6), (April(), small_vit)])
def test_dual_gradient_pruning_breaks_a_closed_form(attack: Attack, net: Build) -> None:
    p = problem(1, module=net())
    o = p.observations[0]
    pruned = _sent(DGP(), p)
    found = attack.reconstruct(dataclasses.replace(o, update=pruned), p.victim)
    assert found.inputs.isfinite().all()
    assert psnr_db(found.inputs, p.images[0]).item() < 15
    assert found.score > 0.1


@pytest.mark.parametrize(
    ("attack", "net", "needed"), [(RGAP(), small_cnn6, "fc.weight"), (April(), small_vit, "position")]
)
def test_what_an_update_does_not_hold_is_a_failure_with_a_reason_or_a_refusal(
    attack: Attack, net: Build, needed: str
) -> None:
    p = problem(1, module=net())
    o = p.observations[0]
    for value, reason in ((torch.nan, "NaN or infinity"), (0.0, f"every entry of {needed} in the observed update")):
        broken = {**o.update, needed: torch.full_like(o.update[needed], value)}
        found = attack.reconstruct(dataclasses.replace(o, update=broken), p.victim)
        assert reason in (found.failure or "")
        assert found.inputs.isfinite().all()
    shown = {k: v for k, v in o.update.items() if k != needed}
    with pytest.raises(IncompatibleError, match=f"needs .*{needed}"):
        attack.reconstruct(dataclasses.replace(o, update=shown), p.victim)
    with pytest.raises(IncompatibleError, match="one example, and this one holds 2"):
        attack.reconstruct(dataclasses.replace(o, num_examples=2), p.victim)


@pytest.mark.parametrize(
    ("attack", "net", "side"),
    [
        (RGAP(), lambda: cnn6((3, 12, 12), 10, channels=(12, 16, 16, 16, 16, 32)), 12),
        (April(), lambda: vit_april((3, 32, 32), 10), 32),
    ],
)
def test_a_real_picture_is_found_above_60_db_from_a_float32_update(
    attack: Attack, net: Build, side: int, data_root: Path
) -> None:
    assert attacked(attack, real_picture(data_root, made(net), side))[0] > 60


def _sent(defense: DGP, p: Problem) -> Update:
    o = p.observations[0]
    own = Batch(p.images[:1], p.labels[:1], torch.ones(1, 1))
    client = Client(p.victim, o.params, o.buffers, own)
    return defense.protect(o.update, client, defense.init_client(o.params), {}, {})[0]
