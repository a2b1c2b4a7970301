"""The closed form of a fully connected first layer, on real digits."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from attack_problems import Problem, problem, psnr_db
from sklearn.datasets import load_digits
from torch import nn

from gia_bench.attacks.analytic import Analytic
from gia_bench.errors import IncompatibleError
from gia_bench.models.functional import Victim
from gia_bench.models.mlp import mlp
from gia_bench.seeding import seeded
from gia_bench.threat import Knowledge
from gia_bench.values import Batch, Observation


def digits(normalised: bool, steps: int = 1, hidden: tuple[int, ...] = (32, 16)) -> Problem:
    """Ten digits, one per update. With several steps the update is server - client weights of plain SGD."""
    data = load_digits()
    images = torch.tensor(data.images[:10] / 16, dtype=torch.float32)[:, None, None]
    labels = torch.tensor(data.target[:10], dtype=torch.int64)[:, None]
    with seeded(0, "digits"):
        net = mlp((1, 8, 8), 10, hidden=hidden)
    mean, std = (torch.tensor([0.3]), torch.tensor([0.4])) if normalised else (None, None)
    victim = Victim(module=net, input_shape=(1, 8, 8), num_classes=10, mean=mean, std=std)
    start, _ = victim.initial()

    def send(x: torch.Tensor, y: torch.Tensor) -> Observation:
        params, rate = start, 1.0 if steps == 1 else 0.1
        for _ in range(steps):
            g = torch.func.grad(lambda p: victim.objective(p, {}, Batch(x, y, torch.ones(1)))[0])(params)
            params = {k: v - rate * g[k] for k, v in params.items()}
        return Observation(params=start, update={k: start[k] - params[k] for k in start}, num_examples=1)

    observations = [send(x, y) for x, y in zip(images, labels, strict=True)]
    return Problem(victim, observations, images, labels)


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("hidden", [(32, 16), ()])
def test_every_image_is_found_above_60_db_with_its_label(normalised: bool, steps: int, hidden: tuple[int, ...]) -> None:
    p = digits(normalised, steps, hidden)
    found = Analytic().reconstruct_many(p.observations, p.victim, seeds=range(10))
    for r, x, y in zip(found, p.images, p.labels, strict=True):
        assert psnr_db(r.inputs, x).item() > 60
        assert torch.equal(r.labels, y)  # type: ignore[arg-type]
        assert r.score < 1e-6
        assert r.failure is None


def test_a_pruned_update_gives_the_image_as_long_as_every_pixel_keeps_a_row() -> None:
    p = digits(normalised=True)
    draw = torch.Generator().manual_seed(0)
    for o, x in zip(p.observations, p.images, strict=True):
        pruned = dict(o.update)
        pruned["features.0.weight"] = o.update["features.0.weight"] * (torch.rand(32, 64, generator=draw) < 0.5)
        found = Analytic().reconstruct(dataclasses.replace(o, update=pruned), p.victim)
        assert psnr_db(found.inputs, x).item() > 60
        assert found.score < 1e-6


def test_noise_shows_in_the_score() -> None:
    p = digits(normalised=True)
    o, draw = p.observations[0], torch.Generator().manual_seed(0)
    noisy = {k: v + 0.01 * torch.randn(v.shape, generator=draw) for k, v in o.update.items()}
    scores = [Analytic().reconstruct(dataclasses.replace(o, update=u), p.victim).score for u in (o.update, noisy)]
    assert scores[0] < 1e-6 < 1e-2 < scores[1] < 1


def test_an_update_without_a_usable_bias_fails_with_a_reason_and_finite_pixels() -> None:
    p = digits(normalised=True)
    o = p.observations[0]
    zero, broken = ({**o.update, "features.0.bias": torch.full((32,), value)} for value in (0.0, torch.nan))
    found = Analytic().reconstruct(dataclasses.replace(o, update=zero), p.victim)
    assert found.failure == "every entry of features.0.bias in the observed update is zero"
    assert found.inputs.isfinite().all()
    failed = Analytic().reconstruct(dataclasses.replace(o, update=broken), p.victim)
    assert failed.failure == "the observed update holds NaN or infinity"
    assert failed.score == torch.inf
    assert failed.inputs.isfinite().all()


def test_what_the_closed_form_cannot_do_is_refused_with_a_way_out() -> None:
    p = digits(normalised=False)
    o = p.observations[0]
    convolution = problem(1)
    without_bias = dataclasses.replace(
        p.victim, module=nn.Sequential(nn.Flatten(), nn.Linear(64, 10, bias=False)), num_classes=10
    )
    shown = {k: v for k, v in o.update.items() if k.startswith("fc")}
    cases = [
        (convolution.observations[0], convolution.victim, "first layer is Conv2d '0'; take model=mlp"),
        (o, without_bias, "begins with a linear layer with a bias"),
        (dataclasses.replace(o, num_examples=2), p.victim, "one example, and this one holds 2"),
        (dataclasses.replace(o, update=shown), p.victim, "needs 'features.0.weight' and 'features.0.bias'"),
    ]
    for observation, victim, sentence in cases:
        with pytest.raises(IncompatibleError, match=sentence):
            Analytic().reconstruct(observation, victim)
    assert Analytic().max_examples == 1
    assert Analytic(labels="known").requires == Knowledge.NUM_EXAMPLES | Knowledge.LABELS
